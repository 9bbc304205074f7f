"""The `rollouts` command: one module a verb, heavy imports inside the verb."""
