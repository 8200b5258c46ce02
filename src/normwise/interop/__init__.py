"""Other frameworks: what their batch norms are by convention, and files that hold norms."""
