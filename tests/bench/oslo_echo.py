"""oslo.messaging's side of the benchmark: an echo server and callers of it.

usage: oslo_echo.py URL server TOPIC
       oslo_echo.py URL client TOPIC CALLERS SECONDS
"""

import json
import logging
import sys
import threading
import time

import oslo_messaging
from oslo_config import cfg


class Echo:
    target = oslo_messaging.Target(version="1.0")

    def echo(self, ctxt, value):
        return value


def transport(url):
    # Some of oslo.messaging's options are registered on the global object alone.
    cfg.CONF([])
    oslo_messaging.set_transport_defaults("drover-bench")
    # oslo.messaging knows a RabbitMQ by another scheme.
    url = url.replace("amqp://", "rabbit://", 1)
    return oslo_messaging.get_rpc_transport(cfg.CONF, url=url)


def serve(url, topic):
    target = oslo_messaging.Target(topic=topic, server="bench")
    server = oslo_messaging.get_rpc_server(
        transport(url), target, [Echo()], executor="threading"
    )
    server.start()
    print("READY", flush=True)
    sys.stdin.read()
    server.stop()


def call(url, topic, callers, seconds):
    client = oslo_messaging.get_rpc_client(
        transport(url), oslo_messaging.Target(topic=topic, version="1.0"), timeout=30
    )
    client.call({}, "echo", value=0)
    latencies = []
    start = threading.Barrier(callers + 1)

    def run():
        mine = []
        start.wait()
        end = time.perf_counter() + seconds
        while (before := time.perf_counter()) < end:
            client.call({}, "echo", value=len(mine))
            mine.append(time.perf_counter() - before)
        latencies.extend(mine)

    threads = [threading.Thread(target=run) for _ in range(callers)]
    for thread in threads:
        thread.start()
    start.wait()
    before = time.perf_counter()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - before
    latencies.sort()
    print(
        json.dumps(
            {
                "calls_per_s": len(latencies) / elapsed,
                "p50_ms": latencies[len(latencies) // 2] * 1e3,
                "p99_ms": latencies[len(latencies) * 99 // 100] * 1e3,
            }
        )
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    if sys.argv[2] == "server":
        serve(sys.argv[1], sys.argv[3])
    else:
        call(sys.argv[1], sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
