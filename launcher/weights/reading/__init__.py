"""Reading: from boxes in files to the memory of tensors, strict and checked."""
