"""What the offline tools do: merging, slicing, converting, comparing, inspecting."""
