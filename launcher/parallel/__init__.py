"""Parallel: the torch edge of the layout. Process groups, meshes, FSDP2 applied to a module."""
