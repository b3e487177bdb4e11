"""Tests of Megatron's indexed datasets."""
