"""The same jobs in other tools, as their users would write them."""
