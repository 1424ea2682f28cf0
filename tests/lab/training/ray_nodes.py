"""A Ray cluster of several nodes on this machine, in a process of its own (run as a script).

Prints its addresses as JSON; the line ``kill PID`` on standard input kills the node on which that
process works, as a power cut would; the end of standard input ends everything.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path


def main() -> None:
    nodes, client_port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    (Path(folder) / "ray").mkdir()
    os.environ["RAY_TMPDIR"] = folder  # of this Ray only, also for the address that it writes down
    head = {
        "num_cpus": 0,
        "ray_client_server_port": client_port,
        "include_dashboard": False,
        "node_ip_address": "127.0.0.1",
    }
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=True)
    workers = [
        cluster.add_node(num_cpus=1, resources={f"node{i}": 1}, node_ip_address="127.0.0.1")
        for i in range(nodes)
    ]
    sys.stdout.write(json.dumps({"address": cluster.address}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        word, _, number = line.strip().partition(" ")
        if word == "kill":
            # Ray's raylet starts the workers of its node.
            parent = int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
            (node,) = (n for n in workers if n.all_processes["raylet"][0].process.pid == parent)
            cluster.remove_node(node, allow_graceful=False)
            sys.stdout.write(json.dumps({"killed": int(number)}) + "\n")
            sys.stdout.flush()
    cluster.shutdown()


if __name__ == "__main__":
    assert Path(sys.argv[3]).is_relative_to(tempfile.gettempdir())
    main()
