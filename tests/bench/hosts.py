"""Two hosts on one machine: network namespaces joined by a cable whose rate can be set.

A namespace has interfaces, addresses and loopback of its own, so what goes from one to the other
goes through the veth pair between them, and its counters see every byte. mpirun reaches the second
one through an agent in the place of ssh. Everything is named after this process, and disappears
with the `with` block.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

SUBNET = "10.99.0"
JUMBO_FRAME = 9000
# A bucket below the largest packet that the kernel hands to a veth (64 KiB) would have every packet
# cut in pieces by the processor that is to compute.
BURST_BYTES = 256 * 1024
# Longer than a socket buffer takes to drain at any rate used here: a full queue drops nothing.
LATENCY = "400ms"


class Hosts:
    """The two namespaces, and the cable between them, unlimited at first."""

    def __init__(self, folder: Path) -> None:
        self.names = [f"oxitron-{os.getpid()}-{end}" for end in "ab"]
        self.cables = [f"ox{os.getpid()}{end}" for end in "ab"]
        self.addresses = [f"{SUBNET}.{number}" for number in (1, 2)]
        self.agent = folder / "agent.sh"
        self.host_file = folder / "hosts"

    def __enter__(self) -> "Hosts":
        check_tools()
        try:
            self.connect()
            self.introduce()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # An impatient second Ctrl-C must not leave half of it behind.
        signals = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        self.remove()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)

    def connect(self) -> None:
        """Makes the namespaces and the cable."""
        for name in self.names:
            ip("netns", "add", name)
        one, other = self.cables
        ip("link", "add", one, "type", "veth", "peer", "name", other)
        for name, cable, address in zip(self.names, self.cables, self.addresses):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "mtu", str(JUMBO_FRAME), "up")
            ip("-n", name, "link", "set", "lo", "up")

    def introduce(self) -> None:
        """Writes what mpirun needs to reach both: a host file and an agent `HOST COMMAND…`."""
        lines = [f"{address} slots=1" for address in self.addresses]
        self.host_file.write_text("\n".join(lines) + "\n")
        cases = [
            f"{address}) exec ip netns exec {name} sh -c \"$*\" ;;"
            for address, name in zip(self.addresses, self.names)
        ]
        head = ["#!/bin/sh", "host=$1", "shift", "case $host in"]
        tail = ["esac", 'echo "no such host: $host" >&2', "exit 1"]
        self.agent.write_text("\n".join([*head, *cases, *tail]) + "\n")
        self.agent.chmod(0o755)

    @property
    def prefix(self) -> list[str]:
        """Goes in front of a command to run it on the first host."""
        return ["ip", "netns", "exec", self.names[0]]

    @property
    def environment(self) -> dict[str, str]:
        """Makes mpirun use the agent, and MPI nothing but TCP over the cable."""
        return {
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMPI_MCA_plm_rsh_agent": shlex.quote(str(self.agent)),
            "OMPI_MCA_btl": "tcp,self",
            "OMPI_MCA_btl_tcp_if_include": f"{SUBNET}.0/24",
            "OMPI_MCA_oob_tcp_if_include": f"{SUBNET}.0/24",
        }

    def limit(self, bits_per_second: float) -> None:
        """Sets the rate of the cable in each direction, by a token bucket at either end."""
        for name, cable in zip(self.names, self.cables):
            place = ["-n", name, "qdisc", "replace", "dev", cable, "root"]
            bucket = ["rate", f"{bits_per_second:.0f}bit", "burst", str(BURST_BYTES)]
            call("tc", *place, "tbf", *bucket, "latency", LATENCY)

    def unlimit(self) -> None:
        """Takes the limit off again."""
        for name, cable in zip(self.names, self.cables):
            call("tc", "-n", name, "qdisc", "delete", "dev", cable, "root")

    def bytes_sent(self) -> list[int]:
        """What each host has sent through the cable since it was laid, headers included."""
        counts = []
        for name, cable in zip(self.names, self.cables):
            shown = call("ip", "-n", name, "-j", "-s", "link", "show", "dev", cable)
            counts.append(json.loads(shown)[0]["stats64"]["tx"]["bytes"])
        return counts

    def remove(self) -> None:
        """Ends what still runs on the hosts and takes them away. The cable goes with its ends."""
        for name in self.names:
            if not Path("/run/netns", name).exists():
                continue
            end_processes(name)
            subprocess.run(["ip", "netns", "delete", name], check=False)
        # Only where moving it into the namespaces failed.
        for cable in self.cables:
            if Path("/sys/class/net", cable).exists():
                subprocess.run(["ip", "link", "delete", cable], check=False)


def end_processes(namespace: str) -> None:
    """Ends the processes of a namespace: daemons that mpirun left there, if any."""
    for _ in range(20):
        listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
        if not listed.stdout.split():
            return
        for pid in listed.stdout.split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.1)


def check_tools() -> None:
    """Stops with a message where namespaces cannot be made."""
    if os.geteuid() != 0:
        sys.exit("network namespaces can only be made by root: run this as root")
    for tool in ("ip", "tc"):
        if not shutil.which(tool):
            sys.exit(f"`{tool}` is missing: apt-get install iproute2")


def ip(*arguments: str) -> None:
    call("ip", *arguments)


def call(*command: str) -> str:
    """Runs a command to its end; its words if it fails, its output if not."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
