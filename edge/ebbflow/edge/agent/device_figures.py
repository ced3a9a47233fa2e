"""The device itself among the metrics: heat, memory, load, battery, energy, and the line to the cloud."""

import os
import threading
import time
from collections.abc import Callable, Iterator

from prometheus_client.registry import Collector

from ebbflow.edge.agent.machine import Machine
from ebbflow.edge.agent.sensors import EnergyMeter
from ebbflow.edge.agent.version import agent_version
from ebbflow.edge.serving.figures import Family, Figures

_PERCENT = 100.0


class DeviceCollector(Collector):
    """Reads the device when somebody asks. What the machine does not tell is left out."""

    def __init__(
        self,
        connected: Callable[[], bool],
        machine: Machine | None = None,
        energy: EnergyMeter | None = None,
    ) -> None:
        """Begins to count the energy.

        Args:
            connected: whether there is a live line to the cloud.
            machine: reads cores, memory, heat and battery.
            energy: reads joules.
        """
        self._connected, self._machine, self._energy = connected, machine or Machine(), energy or EnergyMeter()
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Family]:
        """Yields what the machine tells now."""
        figures = Figures()
        figures.gauge("ebbflow_agent_info", "The agent's software; always 1.", 1.0, {"version": agent_version()})
        figures.gauge("ebbflow_cloud_connected", "1 while there is a line to the cloud.", float(self._connected()))
        with self._lock:
            self._read(figures)
        yield from figures.families()

    def _read(self, figures: Figures) -> None:
        now = self._machine.read(time.monotonic())
        figures.gauge("ebbflow_device_cores", "Cores that the agent may use.", now.cores)
        figures.gauge("ebbflow_device_free_cores", "Of them, what other programs leave to it.", now.free_cores)
        figures.gauge("ebbflow_device_load1", "Processes that run or wait to, over a minute.", os.getloadavg()[0])
        figures.gauge("ebbflow_device_memory_bytes", "Memory of device or container.", now.memory_total_bytes)
        figures.gauge("ebbflow_device_memory_available_bytes", "Of it, not in use.", now.memory_available_bytes)
        if now.heat:
            figures.gauge("ebbflow_device_temperature_celsius", "Sensor nearest to its limit.", now.heat.temperature_c)
            figures.gauge("ebbflow_device_hot_celsius", "Where the device begins to slow down.", now.heat.hot_c)
        if now.battery:
            figures.gauge("ebbflow_device_battery_ratio", "Charge, 0 to 1.", now.battery.percent / _PERCENT)
            figures.gauge("ebbflow_device_on_battery", "1 while it discharges.", float(now.battery.discharging))
        if (joules := self._energy.joules()) is not None:
            figures.counter("ebbflow_device_energy_joules", "Energy of the processor since the agent began.", joules)
