-- Made by cacert-mail; a change by hand is lost.
--
-- Who is signed in writes only in their own names. The policy process decides, and gets the header as it came: it alone knows
-- what a header is. Without its clear word a message has to wait (451): a rule that fails must never let one pass.

local rspamd_http = require "rspamd_http"
local rspamd_logger = require "rspamd_logger"
local ucl = require "ucl"

local URL = "http://127.0.0.1:{{ settings.from_port }}/from"
local SECONDS = 5
local NAME = "FROM_RULE"
local BEGIN = "X-Header-Begins: here\r\n"

local function wait(task, why)
  rspamd_logger.errx(task, "%s: no answer: %s", NAME, why)
  task:set_pre_result("soft reject", "It cannot be looked up now who may send under this From. Try again later.", NAME)
end

local function obey(task, code, body)
  if code ~= 200 then
    return wait(task, "status " .. tostring(code))
  end
  local parser = ucl.parser()
  local parsed, problem = parser:parse_string(tostring(body))
  if not parsed then
    return wait(task, problem)
  end
  local answer = parser:get_object()
  if answer.action == "reject" and type(answer.reason) == "string" then
    -- In a milter's reply a single % is dropped.
    task:set_pre_result("reject", (answer.reason:gsub("%%", "%%%%")), NAME)
  elseif answer.action ~= "accept" then
    wait(task, "neither accept nor reject")
  end
end

-- What the sender wrote. Postfix puts the line before it: without that, the beginning of a body would pass for a header.
local function header(task)
  local all = tostring(task:get_raw_headers())
  if all:sub(1, #BEGIN) ~= BEGIN then
    return nil
  end
  return all:sub(#BEGIN + 1)
end

local function ask(task)
  local block = header(task)
  if block == nil then
    return wait(task, "the header does not begin as Postfix makes it")
  end
  task:set_milter_reply({ remove_headers = { ["X-Header-Begins"] = 1 } })
  local from = task:get_from("smtp")
  local sent = rspamd_http.request({
    task = task,
    url = URL,
    method = "post",
    mime_type = "message/rfc822",
    headers = {
      ["X-Login"] = task:get_user(),
      ["X-Envelope-From"] = from and from[1] and from[1].addr or "",
    },
    -- An empty body would be none.
    body = block == "" and "\r\n" or block,
    timeout = SECONDS,
    keepalive = true,
    callback = function(problem, code, body)
      if problem then
        return wait(task, problem)
      end
      local done, why = pcall(obey, task, code, body)
      if not done then
        wait(task, why)
      end
    end,
  })
  if not sent then
    wait(task, "cannot ask")
  end
end

rspamd_config:register_symbol({
  name = NAME,
  type = "prefilter",
  -- Also for a message with nothing in it.
  flags = "empty",
  callback = function(task)
    if task:get_user() then
      local done, why = pcall(ask, task)
      if not done then
        wait(task, why)
      end
    end
  end,
})
