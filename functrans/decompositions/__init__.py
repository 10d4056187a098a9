"""Composite operators taken apart."""
