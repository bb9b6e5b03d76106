"""`python -m wan.doctor`: what this machine has, whether it computes right, how fast it is, what to expect of it."""
