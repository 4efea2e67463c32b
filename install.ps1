# Installs Lorasmith on Windows, into .venv beside this file, with the build of torch for this machine:
#   powershell -ExecutionPolicy Bypass -File install.ps1
#   .venv\Scripts\lorasmith demo
$ErrorActionPreference = 'Stop'
Set-Location -Path $PSScriptRoot

function Invoke-Checked {
    param([string] $Program, [string[]] $Arguments)
    & $Program @Arguments
    if ($LASTEXITCODE -ne 0) {
        Write-Error "$Program $($Arguments -join ' ') ended with status $LASTEXITCODE."
        exit 1
    }
}

$launcher = Get-Command -Name @('py', 'python') -ErrorAction SilentlyContinue | Select-Object -First 1
if ($null -eq $launcher) {
    Write-Error 'Python 3.11, 3.12 or 3.13 is needed; install it from https://www.python.org/downloads/windows/.'
    exit 1
}
$python = Join-Path -Path '.venv' -ChildPath 'Scripts\python.exe'
if (-not (Test-Path -Path $python)) {
    Invoke-Checked $launcher.Source @('-m', 'venv', '.venv')
}
# Which build fits which driver is known there alone; the file needs nothing but Python.
Invoke-Checked $python @('src\lorasmith\cli\torch_builds.py', '--run')
Invoke-Checked $python @('-m', 'pip', 'install', '.[models,heic,likeness]', '.\lorasmith-tiny', '.\lorasmith-editor')
Write-Output 'Installed. To try it: .venv\Scripts\lorasmith demo'
