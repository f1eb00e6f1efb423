#!/usr/bin/env bash
# Keyward from the shell: grpcurl learns all that it needs from the server itself, by reflection.
#
#     KEYWARD_ADDRESS=127.0.0.1:50051 KEYWARD_TOKEN=kw_… ./drive.sh
#
# The token must hold `keyward:root`. Stops at the first thing that is not as it should be, with exit code 1.
set -euo pipefail

PATH="${KEYWARD_TEST_TOOLS:-/nowhere}/bin:$PATH"
address=${KEYWARD_ADDRESS#http://}
output=

fail() {
  printf 'FAILED (drive.sh:%s): %s\n%s\n' "${BASH_LINENO[-2]}" "$1" "$output" >&2
  exit 1
}

# With -expand-headers grpcurl reads the token from the environment, and with `-d @` the message from standard input: arguments can be
# read by everybody on the machine.
request() { # METHOD JSON [TOKEN]
  request_for 30 "$@"
}

request_for() { # SECONDS METHOD JSON [TOKEN]
  local header=()
  [ -z "${4:-}" ] || header=(-expand-headers -H 'authorization: Bearer ${BEARER}')
  output=$(BEARER=${4:-} grpcurl -plaintext -max-time "$1" "${header[@]}" -d @ "$address" "$2" <<<"$3" 2>&1)
}

call() { # METHOD JSON
  request "keyward.v1.$1" "$2" "$KEYWARD_TOKEN" || fail "$1 failed"
}

call_fails() { # CODE METHOD JSON [TOKEN]
  ! request "keyward.v1.$2" "$3" "${4:-}" || fail "$2 did not fail"
  has "Code: $1"
}

ask() { # WHAT…: list or describe
  output=$(grpcurl -plaintext "$address" "$@" 2>&1) || fail "grpcurl $* failed"
}

has() { # TEXT…: the output has each of them
  local text
  for text in "$@"; do
    [[ $output == *"$text"* ]] || fail "this is missing: $text"
  done
}

field() { # PATH: of the JSON output, such as token.id
  python3 -c 'import functools, json, sys; print(functools.reduce(dict.get, sys.argv[1].split("."), json.load(sys.stdin)))' "$1" <<<"$output"
}

is() { # PATH VALUE
  local found
  found=$(field "$1")
  [ "$found" = "$2" ] || fail "$1 is $found, not $2"
}

# What is there, with its comments.
ask list
has keyward.v1.TokenService keyward.v1.ValidationService keyward.v1.SelfService grpc.health.v1.Health
has keyward.v1.WorkspaceService keyward.v1.PrincipalService keyward.v1.AuditService keyward.v1.NoticeService
ask list keyward.v1.ValidationService
has keyward.v1.ValidationService.ValidateToken keyward.v1.ValidationService.BatchValidateTokens keyward.v1.ValidationService.StreamValidateTokens
ask describe keyward.v1.StreamValidateTokensResponse
has '.google.rpc.Status error = 2;'
ask describe keyward.v1.TokenService
has 'rpc CreateToken' '// Creates a token. The answer holds the secret'
ask describe keyward.v1.CreateTokenRequest
has 'string display_name = 2;' '// Required. 1 to 100 characters'
ask describe keyward.v1.Verdict
has VERDICT_REVOKED '// Ended for good.'

call SelfService/WhoAmI '{}'
has keyward:root

# Create, list, validate, revoke, validate again.
principal=grpcurl-$$-$(date +%s)
call TokenService/CreateToken '{"displayName": "From the shell", "principal": "'"$principal"'", "scopes": ["orders:read"], "ttl": "3600s"}'
id=$(field token.id) secret=$(field secret)
is token.state TOKEN_STATE_ACTIVE
is token.hint "${secret:0:8}"

call TokenService/ListTokens '{"principal": "'"$principal"'"}'
has '"displayName": "From the shell"' "\"id\": \"$id\""
[[ $output != *"$secret"* ]] || fail 'a list shows a secret'

call ValidationService/ValidateToken '{"token": "'"$secret"'", "requiredScopes": ["orders:read"]}'
is valid True
is verdict VERDICT_VALID
is tokenId "$id"

call ValidationService/StreamValidateTokens '{"token": "'"$secret"'"} {"token": "garbage"} {"token": "garbage", "clientIp": "nowhere"}'
has VERDICT_VALID VERDICT_UNKNOWN google.rpc.BadRequest '"field":"client_ip"'

call TokenService/RevokeToken '{"id": "'"$id"'", "reason": "lost"}'
is token.state TOKEN_STATE_REVOKED
is propagation.state PROPAGATION_STATE_COMPLETE
call ValidationService/ValidateToken '{"token": "'"$secret"'"}'
is verdict VERDICT_REVOKED

# A workspace with routes, a token in it, and what its audit says.
brand=sh$$
routes='{"resource": "orders", "endpoint": "/api/orders", "operations": [{"operation": "read", "method": "GET", "path": "/{id}"}]}'
workspace='{"workspace": {"id": "shop-'"$brand"'", "displayName": "Shop", "prefix": "'"$brand"'", "resources": ['"$routes"']}}'
call WorkspaceService/CreateWorkspace "$workspace"
is workspace.policy.maxPermanentTtl 31536000s
call_fails AlreadyExists WorkspaceService/CreateWorkspace "$workspace" "$KEYWARD_TOKEN"
call TokenService/CreateToken '{"workspace": "shop-'"$brand"'", "displayName": "Orders", "scopes": ["orders:*"]}'
shop_secret=$(field secret)
call ValidationService/ValidateToken '{"token": "'"$shop_secret"'", "httpMethod": "GET", "path": "/api/orders/7"}'
is verdict VERDICT_VALID
is derivedScope orders:read
call ValidationService/ValidateToken '{"token": "'"$shop_secret"'", "httpMethod": "DELETE", "path": "/api/orders/7"}'
is verdict VERDICT_INSUFFICIENT_SCOPE
call AuditService/ListAuditEvents '{"workspace": "shop-'"$brand"'", "methods": ["CreateToken"]}'
has '"method": "CreateToken"' '"code": "OK"' '"display_name": "Orders"'
[[ $output != *"$shop_secret"* ]] || fail 'the audit shows a secret'

# What it is told of its tokens.
wishes='{"workspace": {"id": "shop-'"$brand"'", "notices": {"raiseFaults": true, "webhookUrl": "https://10.0.0.1/"}}, "updateMask": {"paths": ["notices"]}}'
call WorkspaceService/UpdateWorkspace "$wishes"
is workspace.notices.raiseFaults True
call_fails InvalidArgument WorkspaceService/UpdateWorkspace "${wishes/https:/ftp:}" "$KEYWARD_TOKEN"
has '"field":"workspace.notices.webhook_url"' 'must begin with https://'
call NoticeService/SendTestNotice '{"workspace": "shop-'"$brand"'"}'
has NOTICE_CHANNEL_WEBHOOK '"recipient": "10.0.0.1"' webhook_allowed_cidrs
call NoticeService/RotateWebhookSecret '{"workspace": "shop-'"$brand"'"}'
has '"webhookSecret": "whsec_'
call TokenService/CreateToken '{"workspace": "shop-'"$brand"'", "displayName": "Brief", "ttl": "86400s"}'
brief=$(field token.id)
for _ in {1..900}; do
  call NoticeService/ListFaults '{"workspace": "shop-'"$brand"'", "tokenId": "'"$brief"'"}'
  [[ $output == *"flt_"* ]] && break
  sleep 0.1
done
has '"daysBefore": 1' '"displayName": "Brief"'
[[ $output =~ flt_[0-9A-Za-z]+ ]]
call NoticeService/AcknowledgeFault '{"id": "'"${BASH_REMATCH[0]}"'"}'
has '"acknowledgedBy"' '"acknowledgeTime"'
call NoticeService/ListNotices '{"workspace": "shop-'"$brand"'"}'
has NOTICE_EVENT_TOKEN_EXPIRING NOTICE_STATE_PENDING

call WorkspaceService/DeleteWorkspace '{"id": "shop-'"$brand"'"}'
call ValidationService/ValidateToken '{"token": "'"$shop_secret"'"}'
is verdict VERDICT_UNKNOWN

# The servers, and what those are told who keep answers: until they hang up.
call ReplicaService/ListReplicas '{}'
has '"self": true' '"headNumber"'
call_fails NotFound ReplicaService/ReleaseReplica '{"id": "evt_0000000000000000000000"}' "$KEYWARD_TOKEN"
! request_for 1 keyward.v1.ValidationService/WatchInvalidations '{}' "$KEYWARD_TOKEN" || fail 'the stream ended'
has '"position"' '"asOfTime"' DeadlineExceeded

# Errors, with their details.
call_fails InvalidArgument TokenService/CreateToken '{"displayName": "", "allowedCidrs": ["10.0.0.0/33"]}' "$KEYWARD_TOKEN"
has google.rpc.BadRequest '"field":"display_name"' '"field":"allowed_cidrs[0]"' google.rpc.ErrorInfo '"domain":"keyward"'
call_fails Unauthenticated TokenService/ListTokens '{}'
call_fails Unauthenticated TokenService/ListTokens '{}' "$secret"
call_fails NotFound TokenService/GetToken '{"id": "tok_0000000000000000000000"}' "$KEYWARD_TOKEN"

# Health, for load balancers and for Kubernetes.
for service in '' keyward.v1.ValidationService; do
  request grpc.health.v1.Health/Check '{"service": "'"$service"'"}' || fail 'the health check failed'
  is status SERVING
done
