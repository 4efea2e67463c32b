"""What training computes, compared with what it computed before."""
