"""The checks of `porter verify`: each takes a Subject and returns a Check."""
