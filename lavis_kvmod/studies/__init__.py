"""Studies: one run file trained in several arms with the same seeds, and what may be concluded from the difference.

`study` reads the file, `member` trains one arm with one seed, `features` is what all share, `running` runs them side by
side, `statistics` compares.
"""
