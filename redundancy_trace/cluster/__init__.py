"""Where checkpoints are scored: in this process, in a process a device, or on the nodes of a Ray cluster.

`jobs` is the unit of work, one checkpoint in, its numbers out, and needs to know nothing of where it is done; `here`,
`workers` (`worker` is their other end) and `ray_tasks` are the places; `places` chooses among them. The sweep fetches,
hands out the work, stores what comes back.
"""

from redundancy_trace.cluster.jobs import Job, Scoring, Watch, told
from redundancy_trace.cluster.places import Places, open_places

__all__ = ["Job", "Places", "Scoring", "Watch", "open_places", "told"]
