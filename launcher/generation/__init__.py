"""Generation: from the tokens of prompts to new tokens."""
