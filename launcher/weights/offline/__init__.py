"""The work of the offline tools: merging, slicing, converting, comparing, inspecting."""
