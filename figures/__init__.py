"""Figures of two models; `python -m figures` makes them anew."""
