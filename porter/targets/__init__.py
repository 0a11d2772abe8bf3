"""Emit targets: what turns a tree written against porter.runtime's layers into one for another engine."""
