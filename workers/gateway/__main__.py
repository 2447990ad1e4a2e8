from workers.gateway.config import GatewayBootstrap
from workers.gateway.worker import run
from workers.process import run_worker

run_worker(GatewayBootstrap, run)
