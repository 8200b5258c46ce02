"""Functional forms, with torch.nn.functional's signatures and keyword-only additions."""

from normwise.functional.batch_norm import batch_moments, batch_norm, batch_norm_update

__all__ = ["batch_moments", "batch_norm", "batch_norm_update"]
