"""Layout: which box of which tensor a rank holds. Pure arithmetic, no torch, no files."""
