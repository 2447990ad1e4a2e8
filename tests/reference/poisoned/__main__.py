"""Run the engine of a configuration until it is told to end."""

import dataclasses
import json
import logging
import sys

from pipeline.engine.config import config_from_dict
from pipeline.engine.topology import ENGINE
from pipeline.launch import launch
from workers.process import LOG_FORMAT

logging.basicConfig(level="INFO", format=LOG_FORMAT.format(role="launcher"))
roles = tuple(
    dataclasses.replace(role, module=f"tests.reference.poisoned.{role.name}")
    if role.name in ("tokenizer", "gpu", "grammar")
    else role
    for role in ENGINE.roles
)
sys.exit(launch(config_from_dict(json.loads(sys.argv[1])), table=dataclasses.replace(ENGINE, roles=roles)))
