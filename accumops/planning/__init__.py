"""What fits into a memory limit: passes that are measured, and the plan made of them."""
