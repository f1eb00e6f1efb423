// Keyward from Node.js: create a token, find it, validate it, revoke it, and read errors with their details; the same in a workspace of its own, by path.
//
//     npm install
//     KEYWARD_ADDRESS=127.0.0.1:50051 KEYWARD_TOKEN=kw_… node drive.js
//
// The token must hold `keyward:root`. Stops at the first thing that is not as it should be, with exit code 1.
'use strict';

const assert = require('node:assert/strict');
const { randomUUID } = require('node:crypto');
const path = require('node:path');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');
const protobuf = require('protobufjs');

const services = ['token', 'validation', 'self', 'workspace', 'audit', 'notice', 'replica'];
const definition = protoLoader.loadSync(
  services.map((name) => `keyward/v1/${name}_service.proto`),
  { includeDirs: [path.join(__dirname, '../../../proto')], enums: String, longs: String, defaults: true, oneofs: true },
);
const { v1 } = grpc.loadPackageDefinition(definition).keyward;

const address = process.env.KEYWARD_ADDRESS.replace('http://', '');

// A client with methods that return promises. Over TLS, grpc.credentials.createFromMetadataGenerator presents the token.
function connect(Service, token) {
  const client = new Service(address, grpc.credentials.createInsecure());
  const metadata = new grpc.Metadata();
  if (token) metadata.set('authorization', `Bearer ${token}`);
  return new Proxy(client, {
    get: (_, method) => (request = {}) =>
      new Promise((resolve, reject) =>
        client[method](request, metadata, { deadline: Date.now() + 10_000 }, (error, answer) => (error ? reject(error) : resolve(answer))),
      ),
  });
}

// The details of an error: https://cloud.google.com/apis/design/errors#error_model
const rpc = protobuf.parse(`
  syntax = "proto3";
  package google.rpc;
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
  message BadRequest {
    message FieldViolation { string field = 1; string description = 2; }
    repeated FieldViolation field_violations = 1;
  }`).root;

function errorDetails(error) {
  const details = {};
  for (const bytes of error.metadata.get('grpc-status-details-bin')) {
    for (const packed of rpc.lookupType('google.rpc.Status').decode(bytes).details) {
      const name = packed.typeUrl.split('/').pop();
      const type = name.startsWith('google.rpc.') && rpc.lookup(name);
      if (type) details[type.name] = type.toObject(type.decode(packed.value), { arrays: true });
    }
  }
  return details;
}

// The call fails with this code and an ErrorInfo; INVALID_ARGUMENT names exactly these fields.
async function assertFails(call, code, fields = []) {
  const error = await call.then(
    () => assert.fail(`${grpc.status[code]} was due, and the answer was OK`),
    (error) => error,
  );
  assert.equal(grpc.status[error.code], grpc.status[code], error.message);
  const { ErrorInfo, BadRequest } = errorDetails(error);
  assert.equal(ErrorInfo?.domain, 'keyward', error.message);
  assert.match(ErrorInfo.reason, /^[A-Z][A-Z0-9_]*$/);
  const named = (BadRequest?.fieldViolations ?? []).map((violation) => violation.field);
  assert.deepEqual(named.sort(), fields.sort(), error.message);
}

async function main() {
  const root = process.env.KEYWARD_TOKEN;
  const tokens = connect(v1.TokenService, root);
  const validation = connect(v1.ValidationService, root);
  const principal = `node-${randomUUID()}`;

  const who = await connect(v1.SelfService, root).whoAmI();
  assert.ok(who.scopes.includes('keyward:root'), 'KEYWARD_TOKEN must hold keyward:root');

  // Create. Sent again with the same requestId, it gets the same token.
  const wish = {
    displayName: 'Deploy in production',
    principal,
    scopes: ['orders:read'],
    audiences: ['shop'],
    metadata: { team: 'café' },
    ttl: { seconds: 3600 },
    requestId: randomUUID(),
  };
  const { token, secret } = await tokens.createToken(wish);
  assert.equal(token.state, 'TOKEN_STATE_ACTIVE');
  assert.equal(token.hint, secret.slice(0, 8));
  assert.equal(token.expireTime.seconds - token.createTime.seconds, 3600);
  const again = await tokens.createToken(wish);
  assert.deepEqual([again.token.id, again.secret], [token.id, secret]);

  // List.
  const second = await tokens.createToken({ displayName: 'Another', principal });
  const page = await tokens.listTokens({ principal, pageSize: 1 });
  assert.deepEqual(page.tokens.map(({ id }) => id), [second.token.id]);
  const last = await tokens.listTokens({ principal, pageSize: 1, pageToken: page.nextPageToken });
  assert.deepEqual([last.tokens.map(({ id }) => id), last.nextPageToken], [[token.id], '']);

  // Validate.
  const use = { token: secret, audience: 'shop', requiredScopes: ['orders:read'] };
  const answer = await validation.validateToken(use);
  assert.deepEqual([answer.valid, answer.verdict], [true, 'VERDICT_VALID']);
  assert.deepEqual([answer.tokenId, answer.principal, answer.metadata], [token.id, principal, { team: 'café' }]);
  const refused = await validation.validateToken({ ...use, requiredScopes: ['orders:write'] });
  assert.deepEqual([refused.valid, refused.verdict], [false, 'VERDICT_INSUFFICIENT_SCOPE']);
  assert.deepEqual(refused.missingScopes, ['orders:write']);
  const batch = await validation.batchValidateTokens({ requests: [use, { token: 'garbage' }, { ...use, audience: 'billing' }] });
  const verdicts = batch.responses.map(({ verdict }) => verdict);
  assert.deepEqual(verdicts, ['VERDICT_VALID', 'VERDICT_UNKNOWN', 'VERDICT_WRONG_AUDIENCE']);

  // Many questions on one stream; what is wrong with one is told in its place.
  const bearer = new grpc.Metadata();
  bearer.set('authorization', `Bearer ${root}`);
  const stream = new v1.ValidationService(address, grpc.credentials.createInsecure()).streamValidateTokens(bearer);
  const ended = new Promise((resolve, reject) => stream.on('status', resolve).on('error', reject));
  const results = stream[Symbol.asyncIterator]();
  for (const question of [use, { token: 'garbage' }, { ...use, clientIp: 'nowhere' }]) stream.write(question);
  const [first, unknown, wrong] = [await results.next(), await results.next(), await results.next()].map(({ value }) => value);
  assert.deepEqual([first.answer.verdict, unknown.answer.verdict], ['VERDICT_VALID', 'VERDICT_UNKNOWN']);
  assert.deepEqual([wrong.result, wrong.error.code], ['error', grpc.status.INVALID_ARGUMENT]);
  assert.equal(wrong.error.details[0].type_url ?? wrong.error.details[0].typeUrl, 'type.googleapis.com/google.rpc.ErrorInfo');
  stream.end();
  assert.equal((await results.next()).done, true);
  assert.equal((await ended).code, grpc.status.OK);

  // Who keeps answers is told which are out of date.
  const watch = new v1.ValidationService(address, grpc.credentials.createInsecure()).watchInvalidations({}, bearer);
  watch.on('error', (error) => assert.equal(error.code, grpc.status.CANCELLED));
  const messages = watch[Symbol.asyncIterator]();
  const { value: start } = await messages.next();
  assert.ok(start.asOfTime && start.invalidations.length === 0);
  const gone = await tokens.createToken({ displayName: 'Gone soon', principal });
  await tokens.revokeToken({ id: gone.token.id });
  let told;
  do told = (await messages.next()).value;
  while (!told.invalidations.some(({ tokenId }) => tokenId === gone.token.id));
  assert.ok(Number(told.position.number) > Number(start.position.number));
  watch.cancel();
  const replicas = connect(v1.ReplicaService, root);
  assert.equal((await replicas.listReplicas()).replicas.filter(({ self }) => self).length, 1);
  await assertFails(replicas.releaseReplica({ id: 'evt_0000000000000000000000' }), grpc.status.NOT_FOUND);

  // Change, revoke, validate again: the answer to a change comes when it is in force.
  const change = { token: { id: token.id, displayName: 'Renamed', etag: token.etag }, updateMask: { paths: ['display_name'] } };
  const updated = await tokens.updateToken(change);
  assert.deepEqual([updated.token.displayName, updated.propagation.state], ['Renamed', 'PROPAGATION_STATE_COMPLETE']);
  await assertFails(tokens.updateToken(change), grpc.status.ABORTED); // The etag is another now.
  const revoked = await tokens.revokeToken({ id: token.id, reason: 'lost' });
  assert.deepEqual([revoked.token.state, revoked.token.revokeReason], ['TOKEN_STATE_REVOKED', 'lost']);
  assert.equal((await validation.validateToken(use)).verdict, 'VERDICT_REVOKED');

  // A workspace of its own, with routes: what a path needs is looked up by Keyward.
  const workspaces = connect(v1.WorkspaceService, root);
  const id = `node-${randomUUID().slice(0, 8)}`;
  const operations = [
    { operation: 'list', method: 'GET' },
    { operation: 'read', method: 'GET', path: '/{id}' },
    { operation: 'create', method: 'POST' },
  ];
  const shop = {
    id,
    displayName: 'Shop',
    prefix: id.replace('-', '').slice(0, 12),
    policy: { maxTokensPerPrincipal: 1 },
    resources: [{ resource: 'orders', endpoint: '/api/orders', operations }],
  };
  const created = await workspaces.createWorkspace({ workspace: shop });
  assert.deepEqual([created.workspace.policy.maxTokensPerPrincipal, created.workspace.policy.allowNever], [1, false]);
  await assertFails(workspaces.createWorkspace({ workspace: shop }), grpc.status.ALREADY_EXISTS);
  const order = { workspace: id, displayName: 'Orders', principal, scopes: ['orders:read'] };
  const ours = await tokens.createToken(order);
  assert.ok(ours.secret.startsWith(`${shop.prefix}_`));
  await assertFails(tokens.createToken(order), grpc.status.FAILED_PRECONDITION); // The policy allows one.
  const byPath = async (httpMethod, path) => {
    const { verdict, derivedScope } = await validation.validateToken({ token: ours.secret, httpMethod, path });
    return [verdict, derivedScope];
  };
  assert.deepEqual(await byPath('GET', '/api/orders/7?full=1'), ['VERDICT_VALID', 'orders:read']);
  assert.deepEqual(await byPath('POST', '/api/orders'), ['VERDICT_INSUFFICIENT_SCOPE', 'orders:create']);
  assert.deepEqual(await byPath('GET', '/api/orders/../orders/7'), ['VERDICT_INSUFFICIENT_SCOPE', '']);
  const { events } = await connect(v1.AuditService, root).listAuditEvents({ workspace: id, methods: ['CreateWorkspace', 'CreateToken'] });
  // The latest first; the principal was made with its first token.
  assert.deepEqual([events.length, events.at(-1).method, events.at(-1).code], [3, 'CreateWorkspace', 'OK']);
  assert.equal(events.at(-1).after.fields.display_name.stringValue, 'Shop');

  // What the workspace is told of its tokens.
  const notices = connect(v1.NoticeService, root);
  const tell = (wishes, ...paths) => workspaces.updateWorkspace({ workspace: { id, notices: wishes }, updateMask: { paths } });
  await assertFails(tell({ webhookUrl: 'ftp://x', renewUrl: 'http://x' }, 'notices'), grpc.status.INVALID_ARGUMENT, [
    'workspace.notices.webhook_url',
    'workspace.notices.renew_url',
  ]);
  await tell({ raiseFaults: true, events: ['NOTICE_EVENT_TOKEN_LEAKED'] }, 'notices');
  const { webhookSecret } = await notices.rotateWebhookSecret({ workspace: id });
  assert.match(webhookSecret, /^whsec_[0-9A-Za-z+/]+=*$/);
  await assertFails(notices.sendTestNotice({ workspace: id }), grpc.status.FAILED_PRECONDITION);
  await tokens.revokeToken({ id: ours.token.id });
  const brief = await tokens.createToken({ workspace: id, displayName: 'Brief', principal, ttl: { seconds: 86_400 } });
  let faults = [];
  for (const end = Date.now() + 90_000; faults.length === 0 && Date.now() < end; await new Promise((next) => setTimeout(next, 100))) {
    ({ faults } = await notices.listFaults({ workspace: id, tokenId: brief.token.id }));
  }
  assert.deepEqual([faults.length, faults[0]?.hint, faults[0]?.daysBefore], [1, brief.token.hint, 1]);
  const { fault } = await notices.acknowledgeFault({ id: faults[0].id });
  assert.equal(fault.acknowledgedBy, who.principal);
  assert.deepEqual((await notices.listFaults({ workspace: id, unacknowledgedOnly: true })).faults, []);
  assert.deepEqual((await notices.listNotices({ workspace: id, state: 'NOTICE_STATE_DEAD' })).notices, []);
  await assertFails(notices.retryNotice({ id: 'ntc_0000000000000000000000' }), grpc.status.NOT_FOUND);

  await workspaces.deleteWorkspace({ id });
  assert.deepEqual(await byPath('GET', '/api/orders/7'), ['VERDICT_UNKNOWN', '']);
  await assertFails(workspaces.getWorkspace({ id }), grpc.status.NOT_FOUND);

  // Errors.
  await assertFails(tokens.createToken({ displayName: '', allowedCidrs: ['10.0.0.0/33'] }), grpc.status.INVALID_ARGUMENT, [
    'display_name',
    'allowed_cidrs[0]',
  ]);
  await assertFails(tokens.listTokens({ pageSize: -1, pageToken: 'forged' }), grpc.status.INVALID_ARGUMENT, ['page_size', 'page_token']);
  await assertFails(tokens.activateToken({ id: token.id }), grpc.status.FAILED_PRECONDITION);
  await tokens.deleteToken({ id: token.id });
  await assertFails(tokens.getToken({ id: token.id }), grpc.status.NOT_FOUND);
  await assertFails(connect(v1.TokenService).listTokens(), grpc.status.UNAUTHENTICATED);
  await assertFails(connect(v1.TokenService, secret).listTokens(), grpc.status.UNAUTHENTICATED);
  await assertFails(connect(v1.TokenService, second.secret).listTokens(), grpc.status.PERMISSION_DENIED);
  await assertFails(validation.validateToken({ token: 'x'.repeat(20 * 1024) }), grpc.status.RESOURCE_EXHAUSTED);
}

main().then(
  () => process.exit(0),
  (error) => {
    const line = error.stack.match(/main \(.*(drive\.js:\d+)/)?.[1];
    console.error(`FAILED (${line}): ${error.message}`);
    process.exit(1);
  },
);
