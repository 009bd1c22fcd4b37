"""Names of other libraries that these do not promise to keep, one module per library.

Each is a small function that says why it is needed and which versions have it. ``tests/internals`` fails when one of
them changes, and when such a name is used anywhere else in the package.
"""
