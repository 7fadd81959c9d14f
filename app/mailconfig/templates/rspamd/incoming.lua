-- Made by cacert-mail; a change by hand is lost.
--
-- What rspamd's modules found out about a message that comes in, written into Authentication-Results (RFC 8601). rspamd's own
-- writer puts the sender's quoted local part or HELO into a comment: with a ) in it, they add results of their own. Here no
-- value has a character that could.

local lua_util = require "lua_util"
local rspamd_logger = require "rspamd_logger"

local NAME = "INCOMING_RESULTS"
local HEADER = "Authentication-Results"
-- The service's listener, as in dkim.lua.
local SERVICE = "service"
local HOST = "{{ file.hostname }}"
local RESULTS = {
  { "spf", {
    R_SPF_ALLOW = "pass", R_SPF_FAIL = "fail", R_SPF_SOFTFAIL = "softfail", R_SPF_NEUTRAL = "neutral",
    R_SPF_DNSFAIL = "temperror", R_SPF_PERMFAIL = "permerror", R_SPF_NA = "none",
  } },
  { "dmarc", {
    DMARC_POLICY_ALLOW = "pass", DMARC_POLICY_REJECT = "fail", DMARC_POLICY_QUARANTINE = "fail",
    DMARC_POLICY_SOFTFAIL = "fail", DMARC_DNSFAIL = "temperror", DMARC_BAD_POLICY = "permerror", DMARC_NA = "none",
  } },
  { "arc", {
    ARC_ALLOW = "pass", ARC_REJECT = "fail", ARC_INVALID = "fail", ARC_DNSFAIL = "temperror", ARC_NA = "none",
  } },
}
-- What rspamd says of a signature; it says "bad record" of one whose key is not in the DNS too.
local DKIM = { allow = "pass", reject = "fail", tempfail = "temperror", permerror = "permerror", ["bad record"] = "permerror" }

local function property(name, value)
  if type(value) == "string" and value:find("^[%w._+/=-]+$") then
    return " " .. name .. "=" .. ((value:find("[/=]") and '"' .. value .. '"') or value)
  end
  return ""
end

local function domain(addresses)
  return addresses and addresses[1] and addresses[1].domain
end

local function results(task)
  local parts = { HOST }
  for _, found in ipairs(task:get_dkim_results() or {}) do
    table.insert(parts, "dkim=" .. (DKIM[found.result] or "neutral") .. property("header.d", found.domain)
      .. property("header.s", found.selector) .. property("header.b", found.bhash))
  end
  if #parts == 1 then
    table.insert(parts, "dkim=none")
  end
  local properties = {
    spf = property("smtp.mailfrom", domain(task:get_from({ "smtp", "orig" }))),
    dmarc = property("header.from", domain(task:get_from({ "mime", "orig" }))),
    arc = "",
  }
  if properties.spf == "" then
    properties.spf = property("smtp.helo", task:get_helo())
  end
  for _, method in ipairs(RESULTS) do
    for symbol, word in pairs(method[2]) do
      if task:has_symbol(symbol) then
        table.insert(parts, method[1] .. "=" .. word .. properties[method[1]])
        break
      end
    end
  end
  return table.concat(parts, "; ")
end

local function is_services(task)
  local listener = task:get_request_header("MTA-Name")
  return listener and tostring(listener) == SERVICE
end

-- What the service sends does not come in. rspamd skips a user's message by itself.
rspamd_config:register_symbol({
  name = "INCOMING_NOT",
  type = "prefilter",
  flags = "empty",
  callback = function(task)
    if is_services(task) then
      for _, check in ipairs({ "SPF_CHECK", "DKIM_CHECK", "ARC_CHECK", "DMARC_CHECK" }) do
        task:disable_symbol(check)
      end
    end
  end,
})

rspamd_config:register_symbol({
  name = NAME,
  type = "postfilter",
  flags = "empty",
  callback = function(task)
    if task:get_user() or is_services(task) then
      return
    end
    local done, text = pcall(results, task)
    if not done then
      -- The message is as good without it.
      return rspamd_logger.errx(task, "%s: %s", NAME, text)
    end
    local value = lua_util.fold_header(task, HEADER, text, ";")
    task:set_milter_reply({ add_headers = { [HEADER] = { value = value, order = 1 } } })
  end,
})
