"""A deterministic simulation of parallel requests against a model.

A seed is a schedule: two to five requests of one browser or two, what their views do, and at every
store call who goes on, what fails and what time it is. The requests run the real code, through
`open_session` and `save_session`, over the memory store. See them at work::

    python -m tests.simulation 4711                 # one schedule, as a trace
    python -m tests.simulation --schedules 100000   # many, up to the first that goes wrong
    python -m tests.simulation --mutations          # how soon broken code is found out

From the inside, `model` follows every effect on the store and says what must be there. From the
outside, `audit` knows only the answers that clients got, and checks that they are true.
"""
