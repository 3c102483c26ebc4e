"""The plumbing between command line, Lightning and W&B. Updates of the template replace it: build beside it."""
