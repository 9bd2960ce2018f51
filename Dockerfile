# One image for every part: engine, Ray worker, sink, producer. CPU build; for GPUs give
# --build-arg BASE=<an image with CUDA, Python 3.11+ and a matching torch>.
ARG BASE=python:3.11-slim
FROM ${BASE}

WORKDIR /opt/headrace
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY headrace headrace
COPY producer producer
COPY engine engine
COPY sink sink
RUN pip install --no-cache-dir -c constraints.txt '.[all]'
COPY examples examples

RUN useradd --create-home headrace && mkdir -p /data && chown headrace /data
USER headrace
ENTRYPOINT ["headrace"]
CMD ["--help"]
