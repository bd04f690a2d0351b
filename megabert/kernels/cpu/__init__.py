"""The operations for a CPU, fused by torch.compile."""
