"""Sinks: consumers of result streams, each with its commit rule."""
