"""What people look at: loss plots and contact sheets."""
