"""Reading: from boxes to bytes in the memory of tensors, strict and checked."""
