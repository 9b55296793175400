"""The names of spans, which are the words of the trace.

An engine with workers has a host track of its own; without workers its thread does both parts.
"""

# Host of the engine.
PLAN = "plan"
DISPATCH = "dispatch"  # hands the plan to the ranks
AWAIT_RESULT = "wait for the result"
COMMIT = "commit"
BETWEEN_STEPS = "between steps"  # whatever the engine's caller does: text, sockets
NO_WORK = "no work"  # no sequence is live

# Host of a rank.
AWAIT_PLAN = "wait for a plan"
MOVE = "move layers"  # between two steps
PREPARE = "prepare"  # applies the plan's diff
LAUNCH = "launch"
SEND = "send"  # activations to the next stage, after the last launch
AWAIT_DEVICE = "wait for the device"  # on the thread that reports results

# Host and device of a rank.
RECEIVE = "receive"  # activations of the stage before, or tokens that the last stage has sampled
SAMPLE = "sample"

# Device of a rank.
COMPUTE = "compute"
COLLECTIVE = "collective"  # inside compute or sample: between the ranks of a stage
