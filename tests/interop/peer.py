"""A real oslo.messaging peer, driven by a test.

usage: peer.py URL EXCHANGE client
       peer.py URL EXCHANGE server TOPIC SERVER

The client reads one JSON order a line and prints one JSON outcome a line:

    {"op": "call" | "cast" | "fanout", "topic": …, "server": …, "namespace": …,
     "version": …, "method": …, "args": {…}, "context": {…},
     "timeout": seconds, "monitor": seconds}

    {"returned": …}  or  {"raised": "module.Class", "bases": ["module.Class", …],
                          "text": …, "kwargs": {…}}

The server prints READY, and serves until its input ends.
"""

import json
import logging
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import oslo_messaging
from oslo_config import cfg

from nova import exception


def transport(url, exchange):
    # Some of oslo.messaging's options are registered on the global object alone.
    cfg.CONF([])
    oslo_messaging.set_transport_defaults(exchange)
    # oslo.messaging knows a RabbitMQ by another scheme.
    url = url.replace("amqp://", "rabbit://", 1)
    return oslo_messaging.get_rpc_transport(
        cfg.CONF, url=url, allowed_remote_exmods=["nova.exception"]
    )


def name(cls):
    return f"{cls.__module__}.{cls.__name__}"


def outcome(client, order):
    prepared = client.prepare(
        **{
            key: order[key]
            for key in ("topic", "server", "namespace", "version", "timeout")
            if order.get(key) is not None
        },
        **({"fanout": True} if order["op"] == "fanout" else {}),
        **({"call_monitor_timeout": order["monitor"]} if order.get("monitor") else {}),
    )
    send = prepared.call if order["op"] == "call" else prepared.cast
    try:
        args = order.get("args", {})
        return {"returned": send(order.get("context", {}), order["method"], **args)}
    except Exception as error:
        return {
            "raised": name(type(error)),
            "bases": [name(base) for base in type(error).__mro__],
            "text": str(error),
            "kwargs": getattr(error, "kwargs", None),
            "exc_type": getattr(error, "exc_type", None),
        }


def client(url, exchange):
    rpc = oslo_messaging.get_rpc_client(
        transport(url, exchange), oslo_messaging.Target(), timeout=30
    )
    print("READY", flush=True)
    for line in sys.stdin:
        print(json.dumps(outcome(rpc, json.loads(line))), flush=True)


class Endpoint:
    target = oslo_messaging.Target(version="1.3")

    def __init__(self):
        self.noted = []

    def echo(self, ctxt, **args):
        ctxt.pop("client_timeout", None)
        return {"context": ctxt, "args": args}

    def nothing(self, ctxt):
        return None

    def precheck(self, ctxt, reason):
        raise exception.MigrationPreCheckError(reason=reason)

    def value_error(self, ctxt):
        raise ValueError("bad value", 42)

    def slow(self, ctxt, seconds):
        time.sleep(seconds)
        return "done"

    def note(self, ctxt, what):
        self.noted.append(what)

    def notes(self, ctxt):
        return self.noted


class Namespaced:
    target = oslo_messaging.Target(namespace="compute_task", version="1.25")

    def migrate_server(self, ctxt, live):
        return {"live": live}


def server(url, exchange, topic, server_name):
    target = oslo_messaging.Target(topic=topic, server=server_name)
    rpc = oslo_messaging.get_rpc_server(
        transport(url, exchange),
        target,
        [Endpoint(), Namespaced()],
        executor="threading",
    )
    rpc.start()
    print("READY", flush=True)
    sys.stdin.read()
    rpc.stop()
    rpc.wait()


if __name__ == "__main__":
    # What a test makes fail on purpose is no news.
    logging.basicConfig(level=logging.CRITICAL)
    url, exchange, role, *rest = sys.argv[1:]
    if role == "client":
        client(url, exchange)
    else:
        server(url, exchange, *rest)
