-- Asks Keyward whether a request may pass, for HAProxy 2.6 or newer: `http-request lua.keyward "http://…/v1/authorize?…"`.
--
-- haproxy.cfg must shut the door unless this has set txn.keyward to "open". It asks with HEAD, so Keyward's answer has no body. Whatever is not 200 ends the request with that status; if Keyward is away that is 502 or 503, if it is slow 504.
local own = "Bearer " .. (os.getenv("KEYWARD_TOKEN") or "")
local identity = { "x-keyward-token-id", "x-keyward-principal", "x-keyward-workspace", "x-keyward-scopes" }
local passed_on = { "www-authenticate", "retry-after", "cache-control", "grpc-status" }
-- HAProxy 2.6 tries four times.
local timeout_ms = 250

-- The values of a header, from 1: no more than two, which are enough to be refused (many more end HAProxy 2.6).
local function values(headers, name)
    local found, index = {}, 0
    while headers[name] and headers[name][index] and index < 2 do
        found[#found + 1] = headers[name][index]
        index = index + 1
    end
    return found
end

-- Not what the client claims about who it is: x_keyward_principal would pass for x-keyward-principal at upstreams that make variables of headers.
local function forget_claims(txn)
    for name in pairs(txn.http:req_get_headers()) do
        if name:lower():gsub("[^%w]", "-"):find("x-keyward-", 1, true) == 1 then
            txn.http:req_del_header(name)
        end
    end
end

local function deny(txn, status, headers)
    local reply = txn:reply({ status = status })
    if headers["grpc-status"] then
        reply:add_header("content-type", "application/grpc")
    end
    for _, name in ipairs(passed_on) do
        for _, value in ipairs(values(headers, name)) do
            reply:add_header(name, value)
        end
    end
    txn:done(reply)
end

core.register_action("keyward", { "http-req" }, function(txn, url)
    forget_claims(txn)
    local asked = {
        ["x-keyward-authorization"] = { own },
        ["x-forwarded-method"] = { txn.sf:method() },
        ["x-forwarded-uri"] = { txn.sf:pathq() },
        ["x-forwarded-for"] = { txn.sf:src() },
    }
    -- With its content type Keyward knows a gRPC client, and refuses it so that it understands.
    for _, name in ipairs({ "authorization", "content-type" }) do
        local presented = values(txn.http:req_get_headers(), name)
        if #presented > 0 then
            asked[name] = presented
        end
    end
    local answer = core.httpclient():head({ url = url, headers = asked, timeout = timeout_ms })
    if not answer or answer.status ~= 200 then
        local told = answer and answer.status or 0
        return deny(txn, told >= 400 and told or 503, answer and answer.headers or {})
    end
    for _, name in ipairs(identity) do
        local value = values(answer.headers, name)[1] or ""
        txn.http:req_set_header(name, value)
        -- HAProxy leaves out what has no room, and says nothing.
        if values(txn.http:req_get_headers(), name)[1] ~= value then
            return deny(txn, 431, {})
        end
    end
    -- The last of all: without it haproxy.cfg lets nobody through.
    txn:set_var("txn.keyward", "open")
end, 1)
