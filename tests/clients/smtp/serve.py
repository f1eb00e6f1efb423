"""A mail server to send to: takes mails as aiosmtpd does, says what it took, and fails on demand.

    pip install -r requirements.txt
    python serve.py

The first line of standard input, a JSON object, says how to serve:

    tls         "none", "starttls" (required before anything else) or "implicit"
    cert, key   the files of its certificate
    user        who has to log in, with `password`; nobody if it is missing
    mode        "ok" takes mails;
                "hang" accepts connections and says nothing;
                "hang_after_data" reads a mail and never answers; "close_in_data" closes when the first line of a mail has come;
                "close_after_data" takes a mail and closes without an answer; "busy" refuses each mail with 451, "full" with 552;
                "down" refuses connections, and closes those that are open
    reject      addresses that are refused with 550
    temporary   addresses that are refused with 451

Each further line changes what it names of mode, reject, temporary, user and password. Ends with standard input.
Standard output is one JSON object a line: {"event": "ready", "port": …} and then what happens: connected, closed, hanging, mail, and set when a change is in force.
"""

import asyncio
import email
import email.policy
import hmac
import json
import logging
import os
import ssl
import sys
import warnings

from aiosmtpd.smtp import SMTP, AuthResult

SETTINGS = {"tls": "none", "cert": None, "key": None, "user": None, "password": None, "mode": "ok", "reject": [], "temporary": []}


def say(event, **facts):
    print(json.dumps({"event": event, **facts}), flush=True)


async def hang():
    """Until the client gives up, which cancels the connection's task."""
    say("hanging")
    await asyncio.Event().wait()


class Connection(SMTP):
    """One connection, which fails where the mode says so."""

    open_ones = set()
    greeted = False

    def connection_made(self, transport):
        if self not in self.open_ones:  # STARTTLS makes the connection once more.
            self.open_ones.add(self)
            say("connected")
        super().connection_made(transport)

    def connection_lost(self, error):
        if self in self.open_ones:
            self.open_ones.remove(self)
            say("closed")
        super().connection_lost(error)

    async def push(self, status):
        if not self.greeted and SETTINGS["mode"] == "hang":
            await hang()
        self.greeted = True
        await super().push(status)
        if SETTINGS["mode"] == "close_in_data" and str(status).startswith("354"):
            await self._reader.readline()
            await self.cut()

    async def cut(self):
        self.transport.close()
        await asyncio.Event().wait()  # The loss of the connection cancels its task.


class Handler:
    """Judges recipients and mails."""

    async def handle_RCPT(self, server, session, envelope, address, options):
        if address in SETTINGS["reject"]:
            return "550 5.1.1 No such mailbox"
        if address in SETTINGS["temporary"]:
            return "451 4.3.0 Try again later"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 OK"

    async def handle_DATA(self, server, session, envelope):
        mode = SETTINGS["mode"]
        if mode == "hang_after_data":
            await hang()
        if mode == "busy":
            return "451 4.3.2 Try again later"
        if mode == "full":
            return "552 5.2.2 Mailbox full"
        say("mail", **described(server, session, envelope))
        if mode == "close_after_data":
            await server.cut()
        return "250 2.0.0 OK"


def described(server, session, envelope):
    message = email.message_from_bytes(envelope.original_content, policy=email.policy.default)

    def part(kind):
        found = message.get_body((kind,))
        return found.get_content() if found else None

    return {
        "from": envelope.mail_from,
        "to": envelope.rcpt_tos,
        "headers": [[name, str(value)] for name, value in message.items()],
        "subject": str(message["subject"] or ""),
        "message_id": str(message["message-id"] or ""),
        "text": part("plain"),
        "html": part("html"),
        "raw": envelope.original_content.decode("utf-8", "replace"),
        "tls": server.transport.get_extra_info("sslcontext") is not None,
        "user": session.auth_data if session.authenticated else None,
        "greeting": session.host_name,
    }


def authenticate(server, session, envelope, mechanism, login):
    """PLAIN and LOGIN bring name and password."""
    given = (login.login or b"", login.password or b"")
    wanted = (SETTINGS["user"].encode(), SETTINGS["password"].encode())
    good = [hmac.compare_digest(*pair) for pair in zip(given, wanted)]
    return AuthResult(success=all(good), handled=False, auth_data=given[0].decode("utf-8", "replace"))


async def main():
    # The server warns of what is asked of it here: logging in without TLS.
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    SETTINGS.update(json.loads(await orders.readline()))

    context = None
    if SETTINGS["tls"] != "none":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(SETTINGS["cert"], SETTINGS["key"])
    implicit, starttls = SETTINGS["tls"] == "implicit", SETTINGS["tls"] == "starttls"

    def connection():
        return Connection(
            Handler(),
            hostname="localhost",
            enable_SMTPUTF8=True,
            tls_context=context if starttls else None,
            require_starttls=starttls,
            auth_required=SETTINGS["user"] is not None,
            auth_require_tls=starttls,
            authenticator=authenticate,
            loop=loop,
        )

    async def listen(port):
        server = await loop.create_server(connection, "127.0.0.1", port, ssl=context if implicit else None)
        return server, server.sockets[0].getsockname()[1]

    server, port = await listen(0)
    say("ready", port=port)
    while True:
        line = await orders.readline()
        if not line:
            os._exit(0)
        SETTINGS.update(json.loads(line))
        if SETTINGS["mode"] == "down" and server:
            server.close()
            server = None
            for each in list(Connection.open_ones):
                each.transport.abort()
        elif SETTINGS["mode"] != "down" and not server:
            server, _ = await listen(port)
        say("set")


asyncio.run(main())
