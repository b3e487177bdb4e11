"""Parallelism: process groups, device meshes, and FSDP2, TP, CP, EP and PP applied to a module."""
