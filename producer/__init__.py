"""Producers: files and data sets that become jobs."""
