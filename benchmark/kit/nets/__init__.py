"""Architectures for small images, one file each."""
