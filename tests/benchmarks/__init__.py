"""Speed, as ratios measured in one process: `python3 dev.py bench`. Nothing here is a
timed test.
"""
