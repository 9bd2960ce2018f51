"""Choosing the next token from logits that lie split over the ranks, without ever gathering them."""
