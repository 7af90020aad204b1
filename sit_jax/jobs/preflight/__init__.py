"""`--mode preflight`: the job, the chips it knows, and what it reads off a compiled program."""
