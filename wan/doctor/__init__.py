"""`python -m wan.doctor`: what this machine has, whether it computes right, how fast it is, and what to expect of it."""
