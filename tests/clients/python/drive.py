"""Keyward from Python: every method, every verdict, and errors with their details.

    pip install -r requirements.txt
    KEYWARD_ADDRESS=127.0.0.1:50051 KEYWARD_TOKEN=kw_… python drive.py

The token must hold `keyward:root`. All that the program makes is in workspaces of its own, which it deletes at its end, so it can run again and again.
Stops at the first thing that is not as it should be, with a message and exit code 1.
"""

import itertools
import os
import pathlib
import queue
import re
import subprocess
import sys
import tempfile
import time
import traceback
import uuid

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

PROTO = pathlib.Path(__file__).resolve().parents[3] / "proto"


def generate_stubs():
    """What one otherwise does once, when the program is built."""
    folder = tempfile.TemporaryDirectory()
    out = [f"--python_out={folder.name}", f"--grpc_python_out={folder.name}"]
    files = [str(path) for path in PROTO.glob("keyward/v1/*.proto")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", *out, *files], check=True)
    sys.path.insert(0, folder.name)
    return folder  # It lives as long as the program.


STUBS = generate_stubs()
from keyward.v1 import audit_service_pb2 as audit  # noqa: E402
from keyward.v1 import audit_service_pb2_grpc, principal_service_pb2_grpc, workspace_service_pb2_grpc  # noqa: E402
from keyward.v1 import notice_service_pb2 as news  # noqa: E402
from keyward.v1 import notice_service_pb2_grpc  # noqa: E402
from keyward.v1 import principal_service_pb2 as people  # noqa: E402
from keyward.v1 import replica_service_pb2 as machines  # noqa: E402
from keyward.v1 import replica_service_pb2_grpc  # noqa: E402
from keyward.v1 import self_service_pb2 as own  # noqa: E402
from keyward.v1 import self_service_pb2_grpc, token_service_pb2_grpc, validation_service_pb2_grpc  # noqa: E402
from keyward.v1 import token_service_pb2 as control  # noqa: E402
from keyward.v1 import validation_service_pb2 as data  # noqa: E402
from keyward.v1 import workspace_service_pb2 as places  # noqa: E402
from keyward.v1.token_pb2 import (  # noqa: E402
    PROPAGATION_STATE_COMPLETE,
    TOKEN_KIND_PERMANENT,
    TOKEN_KIND_TEMPORARY,
    TOKEN_STATE_ACTIVE,
    TOKEN_STATE_INACTIVE,
    TOKEN_STATE_REVOKED,
    Token,
)


class Bearer(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Presents a token with each call. Over TLS, grpc.access_token_call_credentials(token) does the same."""

    def __init__(self, token):
        self.header = ("authorization", f"Bearer {token}")

    def intercept_unary_unary(self, continuation, client_call_details, request):
        return continuation(client_call_details._replace(metadata=[self.header]), request)

    def intercept_unary_stream(self, continuation, client_call_details, request):
        return continuation(client_call_details._replace(metadata=[self.header]), request)

    def intercept_stream_stream(self, continuation, client_call_details, requests):
        return continuation(client_call_details._replace(metadata=[self.header]), requests)


class Keyward:
    """The services, called with one token, or with none."""

    def __init__(self, channel, token=None):
        if token is not None:
            channel = grpc.intercept_channel(channel, Bearer(token))
        self.tokens = token_service_pb2_grpc.TokenServiceStub(channel)
        self.validation = validation_service_pb2_grpc.ValidationServiceStub(channel)
        self.own = self_service_pb2_grpc.SelfServiceStub(channel)
        self.workspaces = workspace_service_pb2_grpc.WorkspaceServiceStub(channel)
        self.principals = principal_service_pb2_grpc.PrincipalServiceStub(channel)
        self.audit = audit_service_pb2_grpc.AuditServiceStub(channel)
        self.notices = notice_service_pb2_grpc.NoticeServiceStub(channel)
        self.replicas = replica_service_pb2_grpc.ReplicaServiceStub(channel)

    def create(self, **fields):
        """A token, for a principal of its own unless one is named."""
        fields = {"display_name": "drive.py", "principal": new_principal(), **fields}
        return self.tokens.CreateToken(control.CreateTokenRequest(**fields))

    def create_workspace(self, **fields):
        name = f"py{uuid.uuid4().hex[:8]}"
        wish = places.Workspace(**{"id": name, "display_name": "drive.py", "prefix": name, **fields})
        return expect_in_force(self.workspaces.CreateWorkspace(places.CreateWorkspaceRequest(workspace=wish))).workspace

    def update_workspace(self, paths, **fields):
        request = places.UpdateWorkspaceRequest(workspace=places.Workspace(**fields), update_mask=FieldMask(paths=paths))
        return expect_in_force(self.workspaces.UpdateWorkspace(request)).workspace

    def delete_workspace(self, workspace):
        expect_in_force(self.workspaces.DeleteWorkspace(places.DeleteWorkspaceRequest(id=workspace.id, reason="drive.py has ended")))

    def validate(self, token, **fields):
        return self.validation.ValidateToken(data.ValidateTokenRequest(token=token, **fields))

    def verdict(self, token, **fields):
        """The verdict's name without its prefix, which agrees with `valid`."""
        answer = self.validate(token, **fields)
        expect(answer.valid == (answer.verdict == data.VERDICT_VALID), f"valid and verdict disagree: {answer}")
        return data.Verdict.Name(answer.verdict).removeprefix("VERDICT_")


def expect(truth, message):
    if not truth:
        raise AssertionError(message)


def expect_equal(found, wanted, what):
    expect(found == wanted, f"{what}: {found!r}, not {wanted!r}")


def expect_in_force(answer):
    expect_equal(answer.propagation.state, PROPAGATION_STATE_COMPLETE, "propagation.state")
    return answer


def error_details(error):
    """The details of an error, by their type."""
    return status_details(rpc_status.from_call(error))


def status_details(status):
    details = {}
    for packed in status.details if status else []:
        for kind in (BadRequest, ErrorInfo):
            if packed.Is(kind.DESCRIPTOR):
                details[kind] = kind()
                packed.Unpack(details[kind])
    return details


def expect_error(code, call, *fields):
    """The call fails with this code and an ErrorInfo; INVALID_ARGUMENT names exactly these fields."""
    try:
        answer = call()
    except grpc.RpcError as error:
        expect_equal(error.code(), code, f"code ({error.details()})")
        details = error_details(error)
        info = details.get(ErrorInfo)
        expect(info is not None, f"{code.name} without ErrorInfo: {error.details()}")
        expect_equal(info.domain, "keyward", "ErrorInfo.domain")
        expect(re.fullmatch("[A-Z][A-Z0-9_]*", info.reason), f"ErrorInfo.reason: {info.reason!r}")
        violations = details.get(BadRequest, BadRequest()).field_violations
        expect_equal(sorted({violation.field for violation in violations}), sorted(fields), f"fields ({error.details()})")
        expect(all(violation.description for violation in violations), "a field violation says nothing")
        return info
    raise AssertionError(f"{code.name} was due, and the answer was OK: {type(answer).__name__}")


def eventually(condition, what, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        expect(time.monotonic() < deadline, f"not within {seconds} s: {what}")
        time.sleep(0.05)


def new_principal():
    return f"python-{uuid.uuid4()}"


INVALID, DENIED, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND
UNAUTHENTICATED, ILLEGAL_STATE = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION


def who_am_i(root, _channel):
    answer = root.own.WhoAmI(own.WhoAmIRequest())
    expect("keyward:root" in answer.scopes, f"KEYWARD_TOKEN must hold keyward:root, and holds {answer.scopes}")
    expect(answer.workspace and answer.principal, "no workspace or principal")
    expect_equal(answer.token.workspace, answer.workspace, "token.workspace")


def create_and_validate(root, _channel):
    principal = new_principal()
    wish = dict(
        display_name="  Deploy in production  ",
        principal=principal,
        scopes=["orders:read", "invoices:*"],
        audiences=["shop", "billing"],
        allowed_cidrs=["10.0.0.0/8", "2001:db8::/32"],
        metadata={"team": "café", "ticket": "OPS-1"},
        ttl=Duration(seconds=3600),
        request_id=str(uuid.uuid4()),
    )
    first = expect_in_force(root.create(**wish))
    token = first.token
    expect(re.fullmatch("tok_[0-9A-Za-z]{22}", token.id), f"token.id: {token.id}")
    expect_equal(token.display_name, "Deploy in production", "token.display_name")
    expect_equal((token.kind, token.state), (TOKEN_KIND_PERMANENT, TOKEN_STATE_ACTIVE), "token.kind, state")
    expect_equal(token.hint, first.secret[:8], "token.hint")
    expect_equal(dict(token.metadata), wish["metadata"], "token.metadata")
    expect_equal(list(token.allowed_cidrs), wish["allowed_cidrs"], "token.allowed_cidrs")
    lifetime = token.expire_time.ToMicroseconds() - token.create_time.ToMicroseconds()
    expect_equal(lifetime, 3_600_000_000, "token.expire_time - create_time, in microseconds")
    expect_equal(root.tokens.GetToken(control.GetTokenRequest(id=token.id)).token, token, "GetToken")

    again = root.create(**wish)
    expect_equal((again.token.id, again.secret), (token.id, first.secret), "id and secret for the same request_id")
    expect_error(INVALID, lambda: root.create(**{**wish, "display_name": "another"}), "request_id")

    use = dict(audience="shop", required_scopes=["orders:read", "invoices:send"], client_ip="10.1.2.3")
    answer = root.validate(first.secret, **use)
    expect_equal((answer.valid, answer.verdict), (True, data.VERDICT_VALID), "verdict")
    expect_equal((answer.token_id, answer.principal, answer.workspace), (token.id, principal, token.workspace), "whose token it is")
    expect_equal((list(answer.scopes), list(answer.audiences)), (wish["scopes"], wish["audiences"]), "scopes, audiences")
    expect_equal(dict(answer.metadata), wish["metadata"], "metadata")
    expect_equal(answer.expire_time, token.expire_time, "expire_time")
    expect_equal(root.verdict(first.secret, **{**use, "client_ip": "2001:db8::1"}), "VALID", "from an IPv6 address")

    root.validate(first.secret, peek=True, **use)
    used = lambda: root.tokens.GetToken(control.GetTokenRequest(id=token.id)).token  # noqa: E731
    eventually(lambda: used().use_count == 2, "use_count of 2: two uses and one that only peeked")
    expect_equal(used().last_used_ip, "2001:db8::1", "last_used_ip")
    expect_equal(used().etag, token.etag, "etag after uses")


def verdicts(root, _channel):
    made = root.create(scopes=["orders:read"], audiences=["shop"], allowed_cidrs=["192.0.2.0/24"])
    secret, use = made.secret, dict(audience="shop", client_ip="192.0.2.1", required_scopes=["orders:read"])
    expect_equal(root.verdict(secret, **use), "VALID", "verdict")

    flipped = secret[:-1] + ("a" if secret[-1] != "a" else "b")
    for text in ("garbage", secret[:-1], secret[1:], secret + "0", flipped, secret.swapcase(), f"Bearer {secret}", " ", "ü\n", "x" * 10_000):
        answer = root.validate(text, **use)
        expect_equal(answer.verdict, data.VERDICT_UNKNOWN, f"verdict of {text[:40]!r}")
        bare = data.ValidateTokenResponse(valid=False, verdict=data.VERDICT_UNKNOWN)
        expect_equal(answer, bare, "an unknown token's answer says nothing more")

    expect_equal(root.verdict(secret, **{**use, "audience": "billing"}), "WRONG_AUDIENCE", "at another product")
    expect_equal(root.verdict(secret, **{**use, "client_ip": "198.51.100.1"}), "IP_NOT_ALLOWED", "from elsewhere")
    expect_equal(root.verdict(secret, **{**use, "client_ip": ""}), "IP_NOT_ALLOWED", "from an address that nobody named")
    answer = root.validate(secret, **{**use, "required_scopes": ["orders:read", "orders:write", "users:read"]})
    expect_equal(answer.verdict, data.VERDICT_INSUFFICIENT_SCOPE, "verdict")
    expect_equal(list(answer.missing_scopes), ["orders:write", "users:read"], "missing_scopes")

    change = control.DeactivateTokenRequest(id=made.token.id)
    off = expect_in_force(root.tokens.DeactivateToken(change)).token
    expect_equal((off.state, root.verdict(secret, **use)), (TOKEN_STATE_INACTIVE, "INACTIVE"), "after DeactivateToken")
    expect_equal(root.tokens.DeactivateToken(change).token.etag, off.etag, "etag when nothing changed")
    on = expect_in_force(root.tokens.ActivateToken(control.ActivateTokenRequest(id=made.token.id))).token
    expect_equal((on.state, root.verdict(secret, **use)), (TOKEN_STATE_ACTIVE, "VALID"), "after ActivateToken")

    revoke = control.RevokeTokenRequest(id=made.token.id, reason="lost")
    revoked = expect_in_force(root.tokens.RevokeToken(revoke)).token
    expect_equal((revoked.state, root.verdict(secret, **use)), (TOKEN_STATE_REVOKED, "REVOKED"), "after RevokeToken")
    expect_equal((revoked.revoke_reason, revoked.HasField("revoke_time")), ("lost", True), "revoke_reason, revoke_time")
    expect_equal(root.tokens.RevokeToken(revoke).token, revoked, "a second RevokeToken changes nothing")
    for call in (
        lambda: root.tokens.ActivateToken(control.ActivateTokenRequest(id=made.token.id)),
        lambda: root.tokens.DeactivateToken(change),
        lambda: root.tokens.RegenerateToken(control.RegenerateTokenRequest(id=made.token.id)),
    ):
        expect_error(ILLEGAL_STATE, call)

    brief = root.create(ttl=Duration(seconds=1)).secret
    expect(root.verdict(brief) in ("VALID", "EXPIRED"), "a token of one second is VALID, then EXPIRED")
    eventually(lambda: root.verdict(brief) == "EXPIRED", "VERDICT_EXPIRED")


def batches(root, _channel):
    good, wrong = root.create().secret, root.create(audiences=["shop"]).secret
    question = data.ValidateTokenRequest
    three = [question(token=good), question(token="garbage"), question(token=wrong, audience="billing")]

    def ask(requests):
        return root.validation.BatchValidateTokens(data.BatchValidateTokensRequest(requests=requests)).responses

    wanted = [data.VERDICT_VALID, data.VERDICT_UNKNOWN, data.VERDICT_WRONG_AUDIENCE]
    for order in itertools.permutations(range(3)):
        expect_equal([answer.verdict for answer in ask([three[i] for i in order])], [wanted[i] for i in order], "order of answers")
    expect_equal({answer.verdict for answer in ask([three[0]] * 1000)}, {data.VERDICT_VALID}, "verdicts of a batch of 1,000")
    expect_error(INVALID, lambda: ask([]), "requests")
    expect_error(INVALID, lambda: ask([three[0]] * 1001), "requests")
    bad = [three[0], question(token=good, client_ip="nowhere"), three[1], question(token=good, required_scopes=["a:b", "*"])]
    expect_error(INVALID, lambda: ask(bad), "requests[1].client_ip", "requests[3].required_scopes[1]")


def streams(root, channel):
    """One stream for many questions; what is wrong with one is told in its place."""
    made, brief = root.create(), root.create()
    question = data.ValidateTokenRequest
    bad = question(token=made.secret, client_ip="nowhere")
    order = [question(token=made.secret), question(token="garbage"), bad] * 500
    results = list(root.validation.StreamValidateTokens(iter(order)))
    expect_equal(len(results), len(order), "results")
    wanted = [data.VERDICT_VALID, data.VERDICT_UNKNOWN, data.VERDICT_UNSPECIFIED]
    expect(all(result.answer.verdict == wanted[place % 3] for place, result in enumerate(results)), "order of results")
    for result in results[2::3]:
        expect_equal(result.WhichOneof("result"), "error", "a field that is wrong")
        expect_equal(result.error.code, INVALID.value[0], "code")
        details = status_details(result.error)
        expect_equal([violation.field for violation in details[BadRequest].field_violations], ["client_ip"], "fields")
        expect_equal(details[ErrorInfo].domain, "keyward", "ErrorInfo.domain")

    # Each question waits for the answer to the one before it; the token is revoked in between.
    questions = queue.SimpleQueue()
    results = root.validation.StreamValidateTokens(iter(questions.get, None))

    def ask(token):
        questions.put(question(token=token))
        return next(results).answer.verdict

    expect_equal(ask(brief.secret), data.VERDICT_VALID, "verdict")
    root.tokens.RevokeToken(control.RevokeTokenRequest(id=brief.token.id))
    expect_equal(ask(brief.secret), data.VERDICT_REVOKED, "verdict after the revocation")
    questions.put(None)
    expect_equal(list(results), [], "results after the last question")
    expect_equal(results.code(), grpc.StatusCode.OK, "code")
    weak = Keyward(channel, root.create().secret)
    expect_error(DENIED, lambda: list(weak.validation.StreamValidateTokens(iter(order))))


def lists(root, _channel):
    principal = new_principal()
    names = [f"list {number}" for number in range(5)]
    made = {name: root.create(display_name=name, principal=principal, audiences=["shop"] if name == names[3] else []).token for name in names}
    root.tokens.DeactivateToken(control.DeactivateTokenRequest(id=made[names[0]].id))
    root.create(principal=principal, kind=TOKEN_KIND_TEMPORARY, display_name="for a session", session_id="s-1")

    def ask(**fields):
        return root.tokens.ListTokens(control.ListTokensRequest(principal=principal, **fields))

    pages, page_token = [], ""
    while page_token or not pages:
        answer = ask(page_size=2, page_token=page_token)
        pages.append([token.display_name for token in answer.tokens])
        page_token = answer.next_page_token
    expect_equal(pages, [names[4:2:-1], names[2:0:-1], names[:1]], "three pages, newest first")

    def found(**fields):
        return sorted(token.display_name for token in ask(**fields).tokens)

    soon = Timestamp(seconds=int(time.time()) + 600)
    expect_equal(found(), names, "all")
    expect_equal(found(query="LIST 2"), [names[2]], "query")
    expect_equal(found(audience="shop"), [names[3]], "audience")
    expect_equal(found(states=[TOKEN_STATE_INACTIVE]), [names[0]], "states")
    expect_equal(found(states=[TOKEN_STATE_ACTIVE, TOKEN_STATE_INACTIVE]), names, "two states")
    expect_equal(found(kind=TOKEN_KIND_TEMPORARY), ["for a session"], "kind")
    expect_equal(found(created_by="nobody"), [], "created_by")
    expect_equal((found(expires_before=soon), found(last_used_before=soon)), ([], names), "expires_before, last_used_before")
    expect_equal([token.display_name for token in ask(order_by="display_name desc").tokens], names[::-1], "order_by")

    page_token = ask(page_size=2).next_page_token
    forged = page_token[:-2] + ("AA" if page_token[-2:] != "AA" else "BB")
    for text in (forged, page_token[1:], "1", "' OR 1=1 --", "ü"):
        expect_error(INVALID, lambda text=text: ask(page_size=2, page_token=text), "page_token")
    expect_error(INVALID, lambda: ask(page_size=2, page_token=page_token, query="list"), "page_token")
    expect_error(INVALID, lambda: ask(page_size=-1, order_by="secret"), "order_by", "page_size")


def updates(root, _channel):
    made = root.create(scopes=["orders:read"], metadata={"team": "a"}, audiences=["shop"])

    def update(paths, **fields):
        token = Token(**{"id": made.token.id, **fields})
        return root.tokens.UpdateToken(control.UpdateTokenRequest(token=token, update_mask=FieldMask(paths=paths)))

    changed = expect_in_force(update(["display_name", "scopes"], display_name="renamed", scopes=["a:b"], metadata={"team": "b"})).token
    expect_equal((changed.display_name, list(changed.scopes)), ("renamed", ["a:b"]), "what the mask names")
    expect_equal(dict(changed.metadata), {"team": "a"}, "what the mask does not name")
    expect(changed.etag != made.token.etag, "the etag is the same after a change")
    expect_equal(root.verdict(made.secret, required_scopes=["a:b"]), "VALID", "after a change")
    expect_equal(root.verdict(made.secret, required_scopes=["orders:read"]), "INSUFFICIENT_SCOPE", "after a change")
    cleared = update(["audiences", "expire_time"], etag=changed.etag).token
    expect_equal((list(cleared.audiences), cleared.HasField("expire_time")), ([], False), "what is named and not set")

    expect_error(grpc.StatusCode.ABORTED, lambda: update(["display_name"], display_name="x", etag=made.token.etag))
    expect_error(INVALID, lambda: update(["display_name", "hint"], display_name="x"), "update_mask.paths[1]")
    expect_error(INVALID, lambda: update([], display_name="x"), "update_mask")
    past = Timestamp(seconds=1_000_000_000)
    expect_error(INVALID, lambda: update(["display_name", "expire_time"], expire_time=past), "token.display_name", "token.expire_time")
    expect_error(INVALID, lambda: update(["display_name"], id="tok_1", display_name="x"), "token.id")
    expect_equal(root.tokens.GetToken(control.GetTokenRequest(id=made.token.id)).token, cleared, "after errors")


def regenerations(root, _channel):
    made = root.create()

    def regenerate(**fields):
        request = control.RegenerateTokenRequest(**{"id": made.token.id, **fields})
        return expect_in_force(root.tokens.RegenerateToken(request))

    request_id = str(uuid.uuid4())
    second = regenerate(grace=Duration(seconds=600), request_id=request_id)
    expect_equal(second.token.id, made.token.id, "id after RegenerateToken")
    expect_equal(second.token.expire_time, made.token.expire_time, "expire_time after RegenerateToken")
    expect_equal(second.token.hint, second.secret[:8], "hint")
    expect(second.HasField("grace_time"), "no grace_time")
    expect_equal((root.verdict(made.secret), root.verdict(second.secret)), ("VALID", "VALID"), "old and new secret, within grace")
    again = regenerate(grace=Duration(seconds=600), request_id=request_id)
    expect_equal((again.secret, again.grace_time), (second.secret, second.grace_time), "answer to the same request_id")

    third = regenerate()
    expect(not third.HasField("grace_time"), "grace_time without grace")
    expect_equal(
        [root.verdict(secret) for secret in (made.secret, second.secret, third.secret)], ["UNKNOWN", "UNKNOWN", "VALID"], "secrets without grace"
    )
    expect_error(INVALID, lambda: regenerate(id="x", grace=Duration(seconds=8 * 86400)), "grace", "id")
    expect_error(INVALID, lambda: regenerate(grace=Duration(seconds=-1)), "grace")
    expect_error(grpc.StatusCode.ABORTED, lambda: regenerate(etag=made.token.etag))


def deletions(root, _channel):
    made = root.create()
    delete = control.DeleteTokenRequest(id=made.token.id)
    expect_error(grpc.StatusCode.ABORTED, lambda: root.tokens.DeleteToken(control.DeleteTokenRequest(id=made.token.id, etag="old")))
    expect_in_force(root.tokens.DeleteToken(delete))
    expect_equal(root.verdict(made.secret), "UNKNOWN", "after DeleteToken")
    expect_error(NOT_FOUND, lambda: root.tokens.DeleteToken(delete))
    expect_error(NOT_FOUND, lambda: root.tokens.GetToken(control.GetTokenRequest(id=made.token.id)))
    expect_error(INVALID, lambda: root.tokens.GetToken(control.GetTokenRequest(id="tok_1")), "id")

    principal = new_principal()
    secrets = [root.create(principal=principal).secret for _ in range(3)]
    request = control.RevokePrincipalTokensRequest(principal=principal, reason="left")
    expect_equal(expect_in_force(root.tokens.RevokePrincipalTokens(request)).revoked_count, 3, "revoked_count")
    expect_equal({root.verdict(secret) for secret in secrets}, {"REVOKED"}, "after RevokePrincipalTokens")
    expect_equal(root.tokens.RevokePrincipalTokens(request).revoked_count, 0, "revoked_count of a second call")
    expect_error(INVALID, lambda: root.tokens.RevokePrincipalTokens(control.RevokePrincipalTokensRequest()), "principal")


def self_service(root, channel):
    principal = new_principal()
    made = root.create(principal=principal, scopes=["keyward:self", "orders:read"])
    bystander = root.create(principal=new_principal()).token
    me = Keyward(channel, made.secret)
    who = me.own.WhoAmI(own.WhoAmIRequest())
    expect_equal((who.principal, who.token.id, list(who.scopes)), (principal, made.token.id, ["keyward:self", "orders:read"]), "WhoAmI")
    other = root.create(principal=principal).token
    mine = {token.id for token in me.own.ListMyTokens(own.ListMyTokensRequest()).tokens}
    expect_equal(mine, {made.token.id, other.id}, "ListMyTokens")
    expect_error(INVALID, lambda: me.own.ListMyTokens(own.ListMyTokensRequest(page_size=-1, page_token="x")), "page_size", "page_token")
    for call in (
        lambda: me.tokens.GetToken(control.GetTokenRequest(id=bystander.id)),
        lambda: me.create(),
        lambda: me.validate(made.secret),
    ):
        expect_error(DENIED, call)

    new = me.own.RegenerateSelf(own.RegenerateSelfRequest(grace=Duration(seconds=600)))
    renewed = Keyward(channel, new.secret)
    for client in (me, renewed):
        expect_equal(client.own.WhoAmI(own.WhoAmIRequest()).token.id, made.token.id, "WhoAmI within grace")
    last = Keyward(channel, renewed.own.RegenerateSelf(own.RegenerateSelfRequest()).secret)
    for client in (me, renewed):
        expect_error(UNAUTHENTICATED, lambda client=client: client.own.WhoAmI(own.WhoAmIRequest()))
    gone = expect_in_force(last.own.RevokeSelf(own.RevokeSelfRequest(reason="done"))).token
    expect_equal((gone.state, gone.revoke_reason), (TOKEN_STATE_REVOKED, "done"), "RevokeSelf")
    expect_error(UNAUTHENTICATED, lambda: last.own.WhoAmI(own.WhoAmIRequest()))


def rights(root, channel):
    for client in (Keyward(channel), Keyward(channel, "garbage"), Keyward(channel, root.create(ttl=Duration(seconds=3600)).secret[:-1])):
        for call in (client.create, lambda client=client: client.validate("x"), lambda client=client: client.own.WhoAmI(own.WhoAmIRequest())):
            expect_error(UNAUTHENTICATED, call)

    plain = Keyward(channel, root.create(scopes=["*"]).secret)
    plain.own.WhoAmI(own.WhoAmIRequest())
    # The caller is authorised before its arguments are looked at.
    for call in (lambda: plain.create(display_name=""), lambda: plain.validate(""), lambda: plain.own.ListMyTokens(own.ListMyTokensRequest())):
        expect_error(DENIED, call)

    gateway = Keyward(channel, root.create(scopes=["keyward:validate"]).secret)
    expect_equal(gateway.verdict(root.create().secret), "VALID", "asked by a gateway")
    expect_error(DENIED, gateway.create)

    admin = Keyward(channel, root.create(scopes=["keyward:admin"]).secret)
    expect_equal(admin.verdict(admin.create(scopes=["orders:read"]).secret), "VALID", "created by an administrator")
    expect_error(DENIED, lambda: admin.create(scopes=["keyward:root"]))
    expect_error(NOT_FOUND, lambda: admin.create(workspace="elsewhere"))
    expect_error(NOT_FOUND, lambda: admin.tokens.ListTokens(control.ListTokensRequest(workspace="elsewhere")))


def wrong_arguments(root, _channel):
    for name in ("", "   ", "x" * 101, "a\nb", "a\x07b", "a\x00b", "pay\u202epal", "a\u2066b", "a\u200fb"):
        expect_error(INVALID, lambda name=name: root.create(display_name=name), "display_name")
    expect_equal(root.create(display_name="ä" * 100).token.display_name, "ä" * 100, "a name of 100 characters")

    # Every wrong field is named, not only the first.
    expect_error(INVALID, lambda: root.create(display_name="", allowed_cidrs=["10.0.0.0/8", "10.0.0.0/33"]), "display_name", "allowed_cidrs[1]")
    expect_error(
        INVALID,
        lambda: root.create(
            principal="no blanks", scopes=["orders:read", "Orders"], audiences=["Shop"], session_id="s", request_id="no blanks", ttl=Duration()
        ),
        "principal", "scopes[1]", "audiences[0]", "session_id", "request_id", "ttl",
    )  # fmt: skip
    for cidr in ("", "10.0.0.1/8", "10.0.0.0/33", "localhost", "2001:db8::/129", "::ffff:10.0.0.0/104"):
        expect_error(INVALID, lambda cidr=cidr: root.create(allowed_cidrs=[cidr]), "allowed_cidrs[0]")
    past = Timestamp(seconds=int(time.time()) - 1)
    expect_error(INVALID, lambda: root.create(expire_time=past), "expire_time")
    expect_error(INVALID, lambda: root.create(ttl=Duration(seconds=-1)), "ttl")
    expect_error(INVALID, lambda: root.create(ttl=Duration(seconds=101 * 366 * 86400)), "ttl")
    expect_error(INVALID, lambda: root.create(kind=TOKEN_KIND_TEMPORARY, never=True), "never")
    expect_error(INVALID, lambda: root.create(kind=TOKEN_KIND_TEMPORARY, ttl=Duration(seconds=86401)), "ttl")
    expect_error(INVALID, lambda: root.create(metadata={str(number): "" for number in range(33)}), "metadata")
    expect_error(INVALID, lambda: root.validate("x", client_ip="10.0.0.0/8", required_scopes=["*"]), "client_ip", "required_scopes[0]")
    expect_error(INVALID, lambda: root.tokens.RevokeToken(control.RevokeTokenRequest(id="x", reason="r" * 201)), "id", "reason")
    expect_error(INVALID, lambda: root.tokens.UpdateToken(control.UpdateTokenRequest()), "token.id", "update_mask")
    bad = control.RegenerateTokenRequest(id="x", grace=Duration(seconds=-1), request_id="a b")
    expect_error(INVALID, lambda: root.tokens.RegenerateToken(bad), "id", "grace", "request_id")
    expect_equal(root.verdict(""), "UNKNOWN", "no token at all")
    expect(not root.create(never=True).token.HasField("expire_time"), "expire_time of a token that never ends")


def large_messages(root, channel):
    info = expect_error(grpc.StatusCode.RESOURCE_EXHAUSTED, lambda: root.validate("x" * 20 * 1024))
    print(f"   a question of 20 KiB: RESOURCE_EXHAUSTED, {info.reason}")
    expect_error(grpc.StatusCode.RESOURCE_EXHAUSTED, lambda: root.create(metadata={"big": "x" * 70 * 1024}))
    huge = [data.ValidateTokenRequest(token="x" * 10_000)] * 150
    batch = data.BatchValidateTokensRequest(requests=huge)
    expect_error(grpc.StatusCode.RESOURCE_EXHAUSTED, lambda: root.validation.BatchValidateTokens(batch))
    expect_equal(root.verdict("garbage"), "UNKNOWN", "the next question on the same connection")
    expect_error(grpc.StatusCode.UNIMPLEMENTED, lambda: channel.unary_unary("/keyward.v1.TokenService/StealToken")(b""))


def workspaces(root, channel):
    id = f"shop-{uuid.uuid4().hex[:8]}"
    policy = places.Policy(default_ttl=Duration(seconds=3600), max_permanent_ttl=Duration(seconds=7200), max_tokens_per_principal=2)
    shop = root.create_workspace(id=id, display_name="  Shop  ", policy=policy)
    expect_equal((shop.id, shop.display_name, shop.suspended), (id, "Shop", False), "id, display_name, suspended")
    expect_equal(shop.policy.max_temporary_ttl.seconds, 86_400, "what the policy leaves out has its default")
    expect_equal((shop.policy.allow_never, shop.policy.principals_on_first_use), (False, True), "allow_never, principals_on_first_use")
    get = places.GetWorkspaceRequest(id=id)
    expect_equal(root.workspaces.GetWorkspace(get).workspace, shop, "GetWorkspace")
    listed, page_token = [], ""
    while page_token or not listed:
        page = root.workspaces.ListWorkspaces(places.ListWorkspacesRequest(page_size=2, page_token=page_token))
        listed, page_token = listed + [workspace.id for workspace in page.workspaces], page.next_page_token
    expect(id in listed and listed == sorted(listed), f"ListWorkspaces, by id: {listed}")

    taken, bad = grpc.StatusCode.ALREADY_EXISTS, dict(id="Shop", display_name="", prefix="K")
    expect_error(taken, lambda: root.create_workspace(id=id))
    expect_error(taken, lambda: root.create_workspace(prefix=shop.prefix))
    wrong = places.Policy(default_ttl=Duration(seconds=0), max_tokens_per_principal=-1)
    expect_error(INVALID, lambda: root.create_workspace(**bad), "workspace.id", "workspace.display_name", "workspace.prefix")
    expect_error(INVALID, lambda: root.create_workspace(policy=wrong), "workspace.policy.default_ttl", "workspace.policy.max_tokens_per_principal")

    # The policy is applied when a token is created.
    holder, wish = new_principal(), dict(workspace=id)
    first = root.create(principal=holder, **wish)
    expect(first.secret.startswith(f"{shop.prefix}_"), "a token begins with the prefix of its workspace")
    lifetime = first.token.expire_time.ToMicroseconds() - first.token.create_time.ToMicroseconds()
    expect_equal(lifetime, 3_600_000_000, "a life of the policy's default_ttl, in microseconds")
    expect_error(INVALID, lambda: root.create(ttl=Duration(seconds=7201), **wish), "ttl")
    expect_error(INVALID, lambda: root.create(never=True, **wish), "never")
    root.create(principal=holder, **wish)
    expect_error(ILLEGAL_STATE, lambda: root.create(principal=holder, **wish))
    root.create(principal=holder, kind=TOKEN_KIND_TEMPORARY, **wish)

    renamed = root.update_workspace(["display_name", "policy.allow_never"], id=id, display_name="Shoe shop", policy=places.Policy(allow_never=True))
    expect_equal((renamed.display_name, renamed.policy.allow_never), ("Shoe shop", True), "what the mask names")
    expect_equal(renamed.policy.max_tokens_per_principal, 2, "what the mask does not name")
    expect(not root.create(never=True, **wish).token.HasField("expire_time"), "a token that never ends")
    expect_error(grpc.StatusCode.ABORTED, lambda: root.update_workspace(["display_name"], id=id, display_name="x", etag=shop.etag))
    expect_error(INVALID, lambda: root.update_workspace(["id"], id=id), "update_mask.paths[0]")
    expect_error(INVALID, lambda: root.update_workspace([], id=id), "update_mask")

    # An administrator stays within its own workspace.
    admin = Keyward(channel, root.create(principal="admin", scopes=["keyward:admin"], **wish).secret)
    seen = admin.workspaces.ListWorkspaces(places.ListWorkspacesRequest()).workspaces
    expect_equal([workspace.id for workspace in seen], [id], "what an administrator sees")
    admin.update_workspace(["policy.principals_on_first_use"], policy=places.Policy(principals_on_first_use=False))
    expect_error(ILLEGAL_STATE, lambda: admin.create(principal=new_principal()))
    expect_error(DENIED, lambda: admin.update_workspace(["prefix"], prefix="kwkwkw"))
    expect_error(DENIED, lambda: admin.create_workspace())
    expect_error(NOT_FOUND, lambda: admin.workspaces.GetWorkspace(places.GetWorkspaceRequest(id="default")))

    suspend, resume = places.SuspendWorkspaceRequest(id=id, reason="unpaid"), places.ResumeWorkspaceRequest(id=id)
    expect(expect_in_force(root.workspaces.SuspendWorkspace(suspend)).workspace.suspended, "suspended")
    expect_equal(root.verdict(first.secret), "WORKSPACE_SUSPENDED", "after SuspendWorkspace")
    expect_error(UNAUTHENTICATED, lambda: admin.own.WhoAmI(own.WhoAmIRequest()))
    expect(not expect_in_force(root.workspaces.ResumeWorkspace(resume)).workspace.suspended, "suspended")
    expect_equal(root.verdict(first.secret), "VALID", "after ResumeWorkspace")
    home = root.own.WhoAmI(own.WhoAmIRequest()).workspace
    expect_error(ILLEGAL_STATE, lambda: root.workspaces.SuspendWorkspace(places.SuspendWorkspaceRequest(id=home)))

    root.delete_workspace(shop)
    expect_equal(root.verdict(first.secret), "UNKNOWN", "after DeleteWorkspace")
    for call in (lambda: root.delete_workspace(shop), lambda: root.workspaces.GetWorkspace(get), lambda: root.create(**wish)):
        expect_error(NOT_FOUND, call)
    expect_error(taken, lambda: root.create_workspace(prefix=shop.prefix))


def principals(root, channel):
    id = new_principal()

    def upsert(client=root, **fields):
        return client.principals.UpsertPrincipal(people.UpsertPrincipalRequest(principal=people.Principal(**{"id": id, **fields})))

    made = expect_in_force(upsert(display_name="Ada", email="ada@example.com", kind=people.PRINCIPAL_KIND_SERVICE))
    ada = made.principal
    expect_equal((made.created, ada.display_name, ada.email, ada.suspended), (True, "Ada", "ada@example.com", False), "UpsertPrincipal")
    expect_equal((ada.kind, ada.role), (people.PRINCIPAL_KIND_SERVICE, people.ROLE_MEMBER), "kind, role")
    get = people.GetPrincipalRequest(id=id)
    expect_equal(root.principals.GetPrincipal(get).principal, ada, "GetPrincipal")
    found = root.principals.ListPrincipals(people.ListPrincipalsRequest(query="ADA@example"))
    expect(id in [principal.id for principal in found.principals], "ListPrincipals by mail address")
    pages = root.principals.ListPrincipals(people.ListPrincipalsRequest(page_size=1))
    expect(len(pages.principals) == 1 and pages.next_page_token, "a page of one")
    changed = upsert(display_name="Ada L.", etag=ada.etag)
    expect_equal((changed.created, changed.principal.email), (False, ""), "every field is taken as it is sent")
    expect_error(grpc.StatusCode.ABORTED, lambda: upsert(etag=ada.etag))
    expect_error(INVALID, lambda: upsert(id="no blanks", display_name="a\nb", email="ada"), "principal.id", "principal.display_name", "principal.email")
    expect_error(INVALID, lambda: root.principals.ListPrincipals(people.ListPrincipalsRequest(page_size=-1, page_token="x")), "page_size", "page_token")

    secret = root.create(principal=id, scopes=["keyward:admin"]).secret
    admin = Keyward(channel, secret)
    expect_error(DENIED, lambda: upsert(admin, role=people.ROLE_ADMIN))
    expect_error(ILLEGAL_STATE, lambda: admin.principals.SuspendPrincipal(people.SuspendPrincipalRequest(id=id)))
    expect_error(NOT_FOUND, lambda: admin.principals.GetPrincipal(people.GetPrincipalRequest(workspace="default", id=id)))
    expect(expect_in_force(root.principals.SuspendPrincipal(people.SuspendPrincipalRequest(id=id, reason="left"))).principal.suspended, "suspended")
    expect_equal(root.verdict(secret), "PRINCIPAL_SUSPENDED", "after SuspendPrincipal")
    expect_error(UNAUTHENTICATED, lambda: admin.own.WhoAmI(own.WhoAmIRequest()))
    expect_error(ILLEGAL_STATE, lambda: root.create(principal=id))
    expect(not expect_in_force(root.principals.ResumePrincipal(people.ResumePrincipalRequest(id=id))).principal.suspended, "suspended")
    expect_equal(root.verdict(secret), "VALID", "after ResumePrincipal")
    gone = expect_in_force(root.principals.DeletePrincipal(people.DeletePrincipalRequest(id=id, reason="left for good")))
    expect_equal((gone.revoked_count, root.verdict(secret)), (1, "REVOKED"), "after DeletePrincipal")
    expect_error(NOT_FOUND, lambda: root.principals.GetPrincipal(get))


def own_tokens(root, channel):
    """What somebody does who has nothing but a token with keyward:self."""
    me = Keyward(channel, root.create(principal=new_principal(), scopes=["keyward:self", "orders:*"]).secret)
    who = me.own.WhoAmI(own.WhoAmIRequest())

    def create(**fields):
        return expect_in_force(me.own.CreateMyToken(own.CreateMyTokenRequest(**{"display_name": "mine", **fields})))

    request_id = str(uuid.uuid4())
    made = create(scopes=["orders:read"], ttl=Duration(seconds=600), request_id=request_id)
    expect_equal((made.token.principal, made.token.created_by, made.token.kind), (who.principal, who.principal, TOKEN_KIND_PERMANENT), "CreateMyToken")
    again = create(scopes=["orders:read"], ttl=Duration(seconds=600), request_id=request_id)
    expect_equal((again.token.id, again.secret), (made.token.id, made.secret), "id and secret for the same request_id")
    day = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 2 * 86_400))
    expect_equal(create(expire_date=day).token.expire_time.ToJsonString(), f"{day}T00:00:00Z", "expire_date")
    expect_error(DENIED, lambda: create(scopes=["invoices:read"]))
    expect_error(DENIED, lambda: create(scopes=["keyward:admin"]))
    expect_error(INVALID, lambda: create(display_name="", expire_date="tomorrow"), "display_name", "expire_date")
    expect_error(DENIED, lambda: Keyward(channel, made.secret).own.CreateMyToken(own.CreateMyTokenRequest(display_name="x")))

    root.update_workspace(["policy.permanent_requires_admin"], policy=places.Policy(permanent_requires_admin=True))
    expect_error(DENIED, create)
    expect_in_force(me.own.IssueTemporaryToken(own.IssueTemporaryTokenRequest()))
    role = people.Principal(id=who.principal, role=people.ROLE_ADMIN)
    expect_in_force(root.principals.UpsertPrincipal(people.UpsertPrincipalRequest(principal=role)))
    create()
    root.update_workspace(["policy.permanent_requires_admin"])


def sessions(root, channel):
    me = Keyward(channel, root.create(principal=new_principal(), scopes=["keyward:self", "orders:read"]).secret)

    def issue(client=me, **fields):
        return client.own.IssueTemporaryToken(own.IssueTemporaryTokenRequest(**fields))

    session = f"session-{uuid.uuid4()}"
    first = expect_in_force(issue(session_id=session, scopes=["keyward:self", "orders:read"], ttl=Duration(seconds=600)))
    expect_equal((first.token.kind, first.token.session_id), (TOKEN_KIND_TEMPORARY, session), "kind, session_id")
    expect_equal(first.token.display_name, "Temporary token", "display_name")
    bound = Keyward(channel, first.secret)
    second, bystander = issue(bound), issue(session_id="another")
    expect_equal(second.token.session_id, session, "the session of the presented token")
    expect_error(INVALID, lambda: issue(bound, session_id="another"), "session_id")
    expect_error(INVALID, lambda: issue(ttl=Duration(seconds=86_401), session_id="x" * 129), "session_id", "ttl")
    expect_error(DENIED, lambda: issue(scopes=["orders:write"]))

    plain = Keyward(channel, second.secret)
    expect_error(DENIED, lambda: plain.own.EndSession(own.EndSessionRequest(session_id="another")))
    expect_error(ILLEGAL_STATE, lambda: me.own.EndSession(own.EndSessionRequest()))
    expect_error(INVALID, lambda: me.own.EndSession(own.EndSessionRequest(session_id="x" * 129)), "session_id")
    ended = expect_in_force(plain.own.EndSession(own.EndSessionRequest()))
    expect_equal(ended.revoked_count, 2, "revoked_count")
    expect_equal([root.verdict(made.secret) for made in (first, second, bystander)], ["REVOKED", "REVOKED", "VALID"], "after EndSession")
    reason = root.tokens.GetToken(control.GetTokenRequest(id=first.token.id)).token.revoke_reason
    expect_equal(reason, "SESSION_ENDED", "revoke_reason")
    expect_equal(me.own.EndSession(own.EndSessionRequest(session_id="another")).revoked_count, 1, "one's own session, by its name")
    expect_equal(me.own.EndSession(own.EndSessionRequest(session_id="another")).revoked_count, 0, "revoked_count of a second call")


def routes(root, _channel):
    operation = places.Operation
    agents = places.Resource(
        resource="agents",
        endpoint="/api/agent-base",
        operations=[
            operation(operation="list", method="GET"),
            operation(operation="create", method="POST"),
            operation(operation="read", method="GET", path="/{id}"),
            operation(operation="export", method="GET", path="/export"),
            operation(operation="run", method="*", path="/{id}/executions/{rest...}"),
        ],
    )
    root.update_workspace(["resources"], resources=[agents])
    id = root.own.WhoAmI(own.WhoAmIRequest()).workspace
    expect_equal(list(root.workspaces.GetWorkspace(places.GetWorkspaceRequest(id=id)).workspace.resources), [agents], "resources")
    reader = root.create(scopes=["agents:list", "agents:read"]).secret
    for method, path, verdict, scope in (
        ("GET", "/api/agent-base", "VALID", "agents:list"),
        ("HEAD", "/api/agent-base", "VALID", "agents:list"),
        ("GET", "/api/agent-base?page=2", "VALID", "agents:list"),
        ("GET", "/api/agent-base/7", "VALID", "agents:read"),
        ("GET", "/api/agent-base/%37", "VALID", "agents:read"),
        ("GET", "/api/agent-base/export", "INSUFFICIENT_SCOPE", "agents:export"),
        ("POST", "/api/agent-base", "INSUFFICIENT_SCOPE", "agents:create"),
        ("DELETE", "/api/agent-base/7/executions/1/log", "INSUFFICIENT_SCOPE", "agents:run"),
        ("DELETE", "/api/agent-base/7", "INSUFFICIENT_SCOPE", ""),
        ("GET", "/api/elsewhere", "INSUFFICIENT_SCOPE", ""),
        ("GET", "/api/agent-base/", "INSUFFICIENT_SCOPE", ""),
        ("GET", "/api//agent-base", "INSUFFICIENT_SCOPE", ""),
        ("GET", "/api/agent-base/../agent-base", "INSUFFICIENT_SCOPE", ""),
        ("GET", "/api/agent-base/a%2Fb", "INSUFFICIENT_SCOPE", ""),
        ("GET", "/api/agent-base/Export", "INSUFFICIENT_SCOPE", ""),
        ("GET", "/api/agent-base/7;x", "INSUFFICIENT_SCOPE", ""),
    ):
        answer = root.validate(reader, http_method=method, path=path)
        found = (data.Verdict.Name(answer.verdict).removeprefix("VERDICT_"), answer.derived_scope)
        expect_equal(found, (verdict, scope), f"{method} {path}")
    answer = root.validate(reader, http_method="GET", path="/api/agent-base", required_scopes=["orders:read"])
    expect_equal((list(answer.missing_scopes), answer.derived_scope), (["orders:read"], "agents:list"), "beside required_scopes")
    expect_equal(root.verdict(root.create(scopes=["agents:*"]).secret, http_method="PATCH", path="/api/agent-base/7/executions/1"), "VALID", "any method")
    expect_error(INVALID, lambda: root.validate(reader, http_method="GET"), "path")
    expect_error(INVALID, lambda: root.validate(reader, path="/api/agent-base"), "http_method")

    wrong = places.Resource(resource="Agents", endpoint="api", operations=[operation(operation="read", method="get", path="/%41")])
    try:
        root.update_workspace(["resources"], resources=[agents, wrong])
        raise AssertionError("a wrong table was taken")
    except grpc.RpcError as error:
        expect_equal(error.code(), INVALID, "code")
        fields = sorted({violation.field for violation in error_details(error)[BadRequest].field_violations})
        part = "workspace.resources[1]"
        wanted = [f"{part}.{name}" for name in ("endpoint", "operations[0].method", "operations[0].path", "resource")]
        expect_equal(fields, wanted, "every mistake of a table")


def leaks(root, channel):
    made, other = root.create(), root.create()
    nobody = Keyward(channel)

    def report(*texts):
        return nobody.own.ReportLeakedTokens(own.ReportLeakedTokensRequest(tokens=texts))

    begin = time.monotonic()
    expect_equal(report("garbage", made.secret), own.ReportLeakedTokensResponse(), "the answer to a report")
    expect(time.monotonic() - begin >= 0.45, "the answer comes after a time that says nothing")
    expect_equal([root.verdict(made.secret), root.verdict(other.secret)], ["REVOKED", "VALID"], "after a report")
    ended = root.tokens.GetToken(control.GetTokenRequest(id=made.token.id)).token
    expect_equal(ended.revoke_reason, "LEAKED", "revoke_reason")

    new = root.tokens.RegenerateToken(control.RegenerateTokenRequest(id=other.token.id, grace=Duration(seconds=600))).secret
    report(other.secret)
    expect_equal([root.verdict(other.secret), root.verdict(new)], ["UNKNOWN", "VALID"], "an old secret is ended alone")
    expect_error(INVALID, report, "tokens")
    expect_error(INVALID, lambda: report(*["x"] * 101), "tokens")
    expect_error(INVALID, lambda: report("x", "x" * 257), "tokens[1]")


def audit_events(root, channel):
    actor = Keyward(channel, root.create(principal="auditor", scopes=["keyward:admin"]).secret)
    made = actor.create(display_name="watched").token
    actor.tokens.RevokeToken(control.RevokeTokenRequest(id=made.id, reason="lost"))

    def ask(**fields):
        return actor.audit.ListAuditEvents(audit.ListAuditEventsRequest(**fields))

    revoked, created = ask(token_id=made.id).events
    expect_equal([event.method for event in (revoked, created)], ["RevokeToken", "CreateToken"], "the events of a token, the latest first")
    expect_equal((revoked.code, revoked.reason, revoked.principal), ("OK", "lost", made.principal), "code, reason, principal")
    expect_equal((revoked.actor_workspace, revoked.actor_principal), (made.workspace, "auditor"), "who it was")
    expect(revoked.actor_address and revoked.actor_token_id.startswith("tok_"), "from where, with which token")
    expect_equal((created.HasField("before"), created.after["display_name"]), (False, "watched"), "before and after a creation")
    expect_equal([revoked.before["state"], revoked.after["state"]], ["ACTIVE", "REVOKED"], "before and after a revocation")

    def ids(**fields):
        return [event.id for event in ask(**fields).events]

    expect_equal(ids(actor="auditor", methods=["RevokeToken"]), [revoked.id], "by actor and method")
    expect(revoked.id in ids(principal=made.principal) and revoked.id in ids(methods=["RevokeToken", "DeleteToken"]), "by principal, by methods")
    expect_equal(ids(token_id=made.id, start_time=revoked.event_time), [revoked.id], "from start_time on")
    expect_equal(ids(token_id=made.id, end_time=revoked.event_time), [created.id], "before end_time")
    page = ask(token_id=made.id, page_size=1)
    rest = ask(token_id=made.id, page_size=1, page_token=page.next_page_token)
    expect_equal([event.id for event in (*page.events, *rest.events)], [revoked.id, created.id], "two pages")
    expect_equal(rest.next_page_token, "", "next_page_token of the last page")

    expect_error(DENIED, actor.create_workspace)
    refused = lambda: ask(actor="auditor", methods=["CreateWorkspace"]).events  # noqa: E731
    eventually(refused, "an event of the refused call")
    expect_equal((refused()[0].code, refused()[0].HasField("after")), ("PERMISSION_DENIED", False), "an event of a refused call")
    expect_error(INVALID, lambda: ask(token_id="tok_1", page_size=-1, page_token="x"), "token_id", "page_size", "page_token")
    expect_error(INVALID, lambda: ask(methods=["RevokeToken"] * 21), "methods")
    expect_error(NOT_FOUND, lambda: ask(workspace="default"))
    plain = Keyward(channel, root.create(scopes=["keyward:self"]).secret)
    expect_error(DENIED, lambda: plain.audit.ListAuditEvents(audit.ListAuditEventsRequest()))


def notices(root, _channel):
    home = root.own.WhoAmI(own.WhoAmIRequest()).workspace
    bad = places.Notices(days_before=[7, -1], emails="ada", webhook_url="http://hooks.example.com", events=[news.NOTICE_EVENT_TEST])
    wrong = [f"workspace.notices.{field}" for field in ("days_before[1]", "emails", "webhook_url", "events[0]")]
    expect_error(INVALID, lambda: root.update_workspace(["notices"], id=home, notices=bad), *wrong)
    expect_error(ILLEGAL_STATE, lambda: root.notices.SendTestNotice(news.SendTestNoticeRequest()))

    wishes = places.Notices(raise_faults=True, days_before=[1, 30], webhook_url="https://10.0.0.1/hook", renew_url="https://example.com/tokens")
    fields = ("raise_faults", "days_before", "webhook_url", "renew_url")
    changed = root.update_workspace([f"notices.{field}" for field in fields], id=home, notices=wishes)
    expect_equal(list(changed.notices.days_before), [30, 1], "days_before, from the farthest")
    again = root.update_workspace(["notices.webhook_url"], id=home, notices=wishes)
    expect_equal(again.etag, changed.etag, "etag when nothing changed")

    # A private address, which the server's operator did not allow.
    (delivery,) = root.notices.SendTestNotice(news.SendTestNoticeRequest()).deliveries
    expect_equal((delivery.channel, delivery.recipient, delivery.delivered), (news.NOTICE_CHANNEL_WEBHOOK, "10.0.0.1", False), "delivery")
    expect("webhook_allowed_cidrs" in delivery.error, f"delivery.error: {delivery.error}")
    first = expect_in_force(root.notices.RotateWebhookSecret(news.RotateWebhookSecretRequest()))
    second = expect_in_force(root.notices.RotateWebhookSecret(news.RotateWebhookSecretRequest()))
    expect(second.webhook_secret.startswith("whsec_") and second.webhook_secret != first.webhook_secret, "a new secret")
    expect(second.HasField("previous_expire_time"), "the one before signs for another day")

    token = root.create(ttl=Duration(seconds=5 * 86_400)).token
    wanted = news.ListFaultsRequest(token_id=token.id, unacknowledged_only=True)
    listed = lambda: root.notices.ListFaults(wanted).faults  # noqa: E731
    eventually(listed, "a fault", seconds=90)
    (fault,) = listed()
    expect_equal((fault.days_before, fault.hint, fault.principal), (30, token.hint, token.principal), "fault")
    expect_equal((fault.workspace, fault.expire_time), (home, token.expire_time), "fault.workspace, expire_time")
    mine = expect_in_force(root.notices.AcknowledgeFault(news.AcknowledgeFaultRequest(id=fault.id))).fault
    expect_equal((mine.acknowledged_by, mine.HasField("acknowledge_time")), ("root", True), "acknowledged_by, acknowledge_time")
    expect_equal(root.notices.AcknowledgeFault(news.AcknowledgeFaultRequest(id=fault.id)).fault, mine, "a second AcknowledgeFault")
    expect_equal(len(listed()), 0, "faults that nobody has acknowledged")

    about = lambda: [each for each in root.notices.ListNotices(news.ListNoticesRequest()).notices if token.id in each.token_ids]  # noqa: E731
    eventually(lambda: about() and about()[0].last_error, "a notice that could not be delivered")
    (notice,) = about()
    expect_equal((notice.event, notice.state), (news.NOTICE_EVENT_TOKEN_EXPIRING, news.NOTICE_STATE_PENDING), "notice.event, state")
    again = expect_in_force(root.notices.RetryNotice(news.RetryNoticeRequest(id=notice.id))).notice
    expect_equal(again.id, notice.id, "RetryNotice")
    expect_error(NOT_FOUND, lambda: root.notices.RetryNotice(news.RetryNoticeRequest(id="ntc_0000000000000000000000")))
    expect_error(NOT_FOUND, lambda: root.notices.AcknowledgeFault(news.AcknowledgeFaultRequest(id="flt_0000000000000000000000")))
    expect_error(INVALID, lambda: root.notices.AcknowledgeFault(news.AcknowledgeFaultRequest(id="fault")), "id")
    # A fault is there as long as it is true.
    root.tokens.RevokeToken(control.RevokeTokenRequest(id=token.id))
    expect_equal(len(root.notices.ListFaults(news.ListFaultsRequest(token_id=token.id)).faults), 0, "faults of a revoked token")


def invalidations(root, channel):
    """What those who keep answers themselves are told, and from where on they go on after a break."""
    made = root.create()
    watch = root.validation.WatchInvalidations(data.WatchInvalidationsRequest())
    start = next(watch)
    expect(start.HasField("as_of_time") and not start.invalidations, f"the first message: {start}")
    root.tokens.RevokeToken(control.RevokeTokenRequest(id=made.token.id))
    tells = lambda message: made.token.id in [each.token_id for each in message.invalidations]  # noqa: E731
    told = next(message for message in watch if tells(message))
    expect(told.position.number > start.position.number, f"positions: {start.position} {told.position}")
    watch.cancel()
    again = root.validation.WatchInvalidations(data.WatchInvalidationsRequest(after=start.position))
    expect(any(tells(message) for message in itertools.islice(again, 3)), "what was missed is told")
    again.cancel()
    ahead = data.WatchPosition(epoch=told.position.epoch, number=told.position.number + 1_000_000)
    expect_error(grpc.StatusCode.FAILED_PRECONDITION, lambda: next(root.validation.WatchInvalidations(data.WatchInvalidationsRequest(after=ahead))))
    weak = Keyward(channel, root.create().secret)
    expect_error(DENIED, lambda: next(weak.validation.WatchInvalidations(data.WatchInvalidationsRequest())))


def replicas(root, channel):
    answer = root.replicas.ListReplicas(machines.ListReplicasRequest())
    (this,) = [replica for replica in answer.replicas if replica.self]
    expect_equal((this.evicted, this.acknowledged_number <= answer.head_number), (False, True), "evicted, acknowledged_number")
    expect_error(INVALID, lambda: root.replicas.ReleaseReplica(machines.ReleaseReplicaRequest()), "id")
    expect_error(NOT_FOUND, lambda: root.replicas.ReleaseReplica(machines.ReleaseReplicaRequest(id="evt_0000000000000000000000")))
    weak = Keyward(channel, root.create(scopes=["keyward:admin"]).secret)
    expect_error(DENIED, lambda: weak.replicas.ListReplicas(machines.ListReplicasRequest()))


def health(_root, channel):
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", "keyward.v1.ValidationService", "keyward.v1.TokenService", "keyward.v1.SelfService"):
        status = stub.Check(health_pb2.HealthCheckRequest(service=service)).status
        expect_equal(status, health_pb2.HealthCheckResponse.SERVING, f"health of {service!r}")
    expect_error(NOT_FOUND, lambda: stub.Check(health_pb2.HealthCheckRequest(service="keyward.v1.NoService")))


STORY = (
    who_am_i, create_and_validate, verdicts, batches, streams, lists, updates, regenerations, deletions, self_service, rights, wrong_arguments,
    large_messages, workspaces, principals, own_tokens, sessions, routes, leaks, audit_events, notices, invalidations, replicas, health,
)  # fmt: skip


def main():
    with grpc.insecure_channel(os.environ["KEYWARD_ADDRESS"].removeprefix("http://")) as channel:
        visitor = Keyward(channel, os.environ["KEYWARD_TOKEN"])
        who_am_i(visitor, channel)
        home = visitor.create_workspace(policy=places.Policy(allow_never=True, max_permanent_ttl=Duration(seconds=100 * 365 * 86_400)))
        root = Keyward(channel, visitor.create(workspace=home.id, principal="root", scopes=["keyward:root"]).secret)
        for chapter in STORY:
            try:
                chapter(root, channel)
            except (AssertionError, grpc.RpcError) as error:
                line = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.name == chapter.__name__][-1]
                reason = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.RpcError) else error
                sys.exit(f"FAILED {chapter.__name__} (drive.py:{line}): {reason}")
            print(f"ok {chapter.__name__}")
        visitor.delete_workspace(home)


if __name__ == "__main__":
    main()
