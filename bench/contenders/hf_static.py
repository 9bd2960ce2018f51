"""transformers' `generate` as a contender: left-padded static batches of `--max-num-seqs` rows."""

from __future__ import annotations

import argparse
import os

from serve import Rows, own_stdout, serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    args = parser.parse_args()
    out = own_stdout()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa"
    ).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0

    @torch.inference_mode()
    def batch(rows: Rows) -> list[list[int]]:
        width, new = max(len(r["prompt"]) for r in rows), max(r["max_tokens"] for r in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row["prompt"]) :] = torch.tensor(row["prompt"])
            mask[i, width - len(row["prompt"]) :] = 1
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        return [made[i, width:][: r["max_tokens"]].tolist() for i, r in enumerate(rows)]

    def run(rows: Rows) -> list[list[int]]:
        step = args.max_num_seqs
        return [ids for at in range(0, len(rows), step) for ids in batch(rows[at : at + step])]

    serve(out, {"name": "transformers", "version": transformers.__version__}, run, lambda: None)


if __name__ == "__main__":
    main()
