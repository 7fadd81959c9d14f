-- Made by cacert-mail; a change by hand is lost.
--
-- Signs what our own users send, what the service sends, and what a registered network sends, with every key that the worker's
-- file names for the domain of From. What should be signed and cannot be has to wait (451): it never leaves unsigned.

{% if file.trusted_networks %}
local lua_maps = require "lua_maps"
{% endif %}
local rspamd_logger = require "rspamd_logger"
local ucl = require "ucl"

local NAME = "DKIM_SIGN"
local FILE = "{{ dkim_table }}"
-- Postfix says it of the service's listener alone (milter_macro_daemon_name in master.cf); no client can.
local SERVICE = "service"
-- Those of the host's own file, which may send anything; never a class of addresses.
local NETWORKS = {{ 'lua_maps.map_add_from_ucl({ "%s" }, "radix", "networks that are signed for")' % (file.trusted_networks | join('", "')) if file.trusted_networks else "nil" }}

-- By domain, a list of { selector, key }, as the file was when it was last whole.
local domains = nil

-- For each message: the file is small, and a key signs from the moment that the worker puts it into its place.
local function read()
  local file = assert(io.open(FILE, "r"))
  local text = file:read("*a")
  file:close()
  local parser = ucl.parser()
  assert(parser:parse_string(text))
  local all = parser:get_object()
  for _, keys in pairs(all.domains) do
    assert(#keys > 0, "a domain without a key")
    for _, key in ipairs(keys) do
      assert(type(key.selector) == "string" and type(key.path) == "string", "a key without its selector or path")
    end
  end
  return all.domains
end

-- The processes are forked after this: each begins with the file as it was then, whatever becomes of it before its first message.
local whole, first = pcall(read)
if whole then
  domains = first
end

local function wait(task, why)
  rspamd_logger.errx(task, "%s: not signed: %s", NAME, why)
  task:set_pre_result("soft reject", "It cannot be signed now. Try again later.", NAME)
end

local function ours(task)
  if task:get_user() then
    return true
  end
  local listener = task:get_request_header("MTA-Name")
  if listener and tostring(listener) == SERVICE then
    return true
  end
  local address = task:get_from_ip()
  return NETWORKS ~= nil and address:is_valid() and NETWORKS:get_key(address)
end

local function sign(task)
  local done, found = pcall(read)
  if done then
    domains = found
  else
    rspamd_logger.errx(task, "%s: %s: %s", NAME, FILE, found)
  end
  if domains == nil then
    return wait(task, "no list of keys")
  end
  local from = task:get_from("mime")
  local domain = from and from[1] and from[1].domain:lower()
  for _, key in ipairs(domain and domains[domain] or {}) do
    if not rspamd_plugins.dkim.sign(task, { domain = domain, selector = key.selector, key = key.path }) then
      return wait(task, "by " .. key.selector)
    end
  end
end

rspamd_config:register_symbol({
  name = NAME,
  type = "normal",
  flags = "empty",
  callback = function(task)
    local done, why = pcall(function()
      if ours(task) then
        sign(task)
      end
    end)
    if not done then
      wait(task, why)
    end
  end,
})
