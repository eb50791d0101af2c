"""Where images come from: one file per source, each a class under `@register("dataset", NAME)`.

A source has `.files()`, the files that it reads, and `.read()`, which reads them all. Making one and asking for its
files imports neither torch nor a reader's library, so a fingerprint costs only the hashing.
"""
