"""This package computes the operations on a CPU, fused by torch.compile."""
