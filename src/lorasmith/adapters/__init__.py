"""What is trained: one algorithm a file behind one contract."""
